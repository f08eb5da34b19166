"""`stepdistill compare` end to end: trains, judges, resumes, keeps failures as rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rewards.test_clip import save_tiny
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.comparison.own_teacher import Own, OwnTeacher
from stepdistill.comparison.students import Student


def result(out: Path, name: str) -> dict:
    return json.loads((out / "results" / f"{name}_seed0.json").read_text())


@pytest.mark.slow
def test_digits_from_teacher_to_report(tmp_path, capsys) -> None:
    out = tmp_path / "compared"
    command = ["compare", "--output_dir", str(out), "--budget", "5steps", "--steps", "1"]
    command += ["--demo_teacher_steps", "5", "--demo_pairs", "64", "--demo_noise_seeds", "1"]
    main([*command, "--methods", "lcm,reflow"])
    assert result(out, "reflow_1")["updates"] == [5]
    assert result(out, "consistency_1")["rows"][0]["frechet"]["mean"] > 0
    told = capsys.readouterr().out
    assert "| reflow |" in told
    assert "Take " in told
    before = (out / "results" / "reflow_1_seed0.json").stat().st_mtime_ns
    main([*command, "--methods", "lcm,reflow"])
    assert (out / "results" / "reflow_1_seed0.json").stat().st_mtime_ns == before
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_teacher_of_one_s_own_and_a_method_that_fails(tmp_path, tmp_path_factory, capsys) -> None:
    teacher, clip = teacher_dir("sd_v", tmp_path_factory), save_tiny(tmp_path / "clip")
    prompts, bad = tmp_path / "prompts.txt", tmp_path / "bad.yaml"
    prompts.write_text("a red cube\na blue ball\na cat\na dog\n")
    bad.write_text("method: dmd2\nmethod_config: {nonsense: 1}\n")
    out = tmp_path / "out"
    command = ["compare", "--teacher", str(teacher), "--prompts_file", str(prompts)]
    command += ["--features", f"clip:local-dir:{clip}", "--guidance", "1", "--student", "lora"]
    command += ["--train_batch_size", "2", "--num_pairs", "4", "--pair_steps", "2"]
    command += ["--teacher_steps", "2", "4", "--num_images_per_prompt", "2", "--steps", "1", "2"]
    command += ["--methods", f"dmd2,lcm,broken={bad}", "--budget", "2steps"]
    main([*command, "--output_dir", str(out)])
    told = capsys.readouterr().out
    assert result(out, "dmd2_2")["rows"][0]["network_calls"] == 2
    assert [row["steps"] for row in result(out, "lcm_1_2")["rows"]] == [1, 2]
    assert result(out, "lcm_1_2")["data"] == "pairs"  # no images were given
    assert "| broken for 1, seed 0: failed |" in told
    assert "nonsense" in json.loads((out / "failures" / "broken_1_seed0.json").read_text())["error"]
    assert "| lcm |" in told


def own(tmp_path: Path, tmp_path_factory, **more) -> OwnTeacher:
    given = {"teacher": str(teacher_dir("sd_v", tmp_path_factory)), "prompts_file": "p.txt"}
    return OwnTeacher(tmp_path, Own(**given, features=["digits"], **more))


@pytest.mark.parametrize("family", ["dit", "unet2d", "wan_i2v"])
def test_a_teacher_told_by_more_or_less_than_prompts_is_refused(
    tmp_path, tmp_path_factory, family
) -> None:
    told = Own(str(teacher_dir(family, tmp_path_factory)), "p.txt", features=["digits"])
    with pytest.raises(ValueError, match="told by prompts alone"):
        OwnTeacher(tmp_path, told)


def test_what_is_the_same_for_all_lies_over_a_method_s_file(tmp_path, tmp_path_factory) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("learning_rate: 0.5\n")
    ground = own(tmp_path, tmp_path_factory, guidance=3.0, student="lora", config=[str(over)])
    dmd2, lcm = ground.settings("dmd2"), ground.settings("lcm")
    assert dmd2["learning_rate"] == lcm["learning_rate"] == 0.5
    assert dmd2["method_config"]["guidance"] == 3.0
    assert lcm["method_config"]["guidance_range"] == [3.0, 3.0]
    assert lcm["method_config"]["embed_guidance"] is False
    assert dmd2["tuning"]["student"] == dmd2["tuning"]["fake"] == "lora"
    assert dmd2["adam_beta2"] == 0.999  # its file's


def test_step_counts_go_into_the_option_that_means_them(tmp_path, tmp_path_factory) -> None:
    ground = own(tmp_path, tmp_path_factory)

    def option(method: str, name: str) -> object:
        (training,) = ground.trainings(Student(method, (2,)))
        return training.settings["method_config"][name]

    assert option("dmd2", "num_steps") == 2
    assert option("pcm", "num_phases") == 2
    assert option("lora_guidance", "num_steps") == [2]
    assert option("reflow", "stage") == "distill"


def test_warm_up_shrinks_with_a_short_budget(tmp_path, tmp_path_factory) -> None:
    (training,) = own(tmp_path, tmp_path_factory).trainings(Student("dmd2", (1,)))
    assert training.settings["lr_warmup_steps"] == 500
    assert training.lasting(50)["lr_warmup_steps"] == 5
    assert training.lasting(50)["max_train_steps"] == 50
