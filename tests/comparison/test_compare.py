"""`stepdistill compare` end to end: trains, judges, resumes, keeps failures as rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation.test_features import Mean
from rewards.test_clip import save_tiny
from support.runs import teacher_dir
from support.samples import image_folder

from stepdistill.cli import main
from stepdistill.comparison.runs import run_all
from stepdistill.comparison.students import Student
from stepdistill.comparison.user_options import UserOptions
from stepdistill.comparison.user_teacher import UserTeacher
from stepdistill.config.files import method_config, parse_run_config
from stepdistill.config.guidance import stated_for
from stepdistill.config.layers import layers_of
from stepdistill.evaluation.learned import FeatureSettings
from stepdistill.methods import METHODS


def result(out: Path, name: str) -> dict:
    return json.loads((out / "results" / f"{name}_seed0.json").read_text())


@pytest.mark.every  # as tests/test_readme_evaluation.py, of the digits
def test_digits_from_teacher_to_report(tmp_path, capsys) -> None:
    out = tmp_path / "compared"
    command = ["compare", "--output_dir", str(out), "--budget", "5steps", "--steps", "1"]
    command += ["--demo_data", "digits", "--demo_teacher_steps", "5"]
    command += ["--demo_pairs", "64", "--demo_noise_seeds", "1"]
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


@pytest.mark.full
@pytest.mark.usefixtures("forked_students")
def test_a_teacher_of_one_s_own_and_a_method_that_fails(
    tmp_path, tmp_path_factory, capsys, monkeypatch
) -> None:
    teacher, clip = teacher_dir("sd3", tmp_path_factory), save_tiny(tmp_path / "clip")
    prompts, bad = tmp_path / "prompts.txt", tmp_path / "bad.yaml"
    prompts.write_text("a red cube\na blue ball\na cat\na dog\n")
    bad.write_text("method: dmd2\nlearning_rate: 1.0e+30\nlr_warmup_steps: 0\n")
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
    error = json.loads((out / "failures" / "broken_1_seed0.json").read_text())["error"]
    assert error.startswith("WatchdogStop: ")
    assert "| lcm |" in told
    assert "- Failed: broken for 1 (1 seed), broken for 2 (1 seed)" in told
    assert "Scatter: not known" in told
    assert "guidance 1" in told  # for every method
    assert (out / "students" / "lcm_2" / "distillation.json").is_file()
    # From another folder, and with another file under a name that has finished.
    monkeypatch.chdir(tmp_path.parent)
    main(["compare", "--output_dir", str(out)])
    other = tmp_path / "other.yaml"
    other.write_text("method: dmd2\nlearning_rate: 0.5\n")
    changed = " ".join(command).replace("dmd2,lcm", f"dmd2={other},lcm").split(" ")
    with pytest.raises(SystemExit, match="error: methods: expected dmd2 with the settings"):
        main([*changed, "--output_dir", str(out)])


def own(tmp_path: Path, tmp_path_factory, **more) -> UserTeacher:
    given = {"teacher": str(teacher_dir("sd3", tmp_path_factory)), "prompts_file": "p.txt"}
    return UserTeacher(tmp_path, UserOptions(**given, features=["digits"], **more))


@pytest.mark.parametrize("family", ["dit", "unet2d", "wan_i2v"])
def test_a_teacher_told_by_more_or_less_than_prompts_is_refused(
    tmp_path, tmp_path_factory, family
) -> None:
    told = UserOptions(str(teacher_dir(family, tmp_path_factory)), "p.txt", features=["digits"])
    with pytest.raises(ValueError, match="told by prompts alone"):
        UserTeacher(tmp_path, told)


def test_what_is_the_same_for_all_lies_over_a_method_s_file(tmp_path, tmp_path_factory) -> None:
    over = {"learning_rate": 0.5}
    setup = own(tmp_path, tmp_path_factory, guidance=3.0, student="lora", settings=over)
    dmd2, lcm = setup.settings("dmd2"), setup.settings("lcm")
    assert dmd2["learning_rate"] == lcm["learning_rate"] == 0.5
    assert dmd2["method_config"]["guidance"] == 3.0
    assert lcm["method_config"]["guidance_range"] == [3.0, 3.0]
    assert lcm["method_config"]["embed_guidance"] is False
    assert dmd2["tuning"]["student"] == dmd2["tuning"]["fake"] == "lora"
    assert dmd2["adam_beta1"] == 0.0  # its recipe's
    assert lcm["adam_beta1"] == 0.9


def test_what_learns_from_preferences_is_not_compared(tmp_path, tmp_path_factory) -> None:
    setup = own(tmp_path, tmp_path_factory)
    with pytest.raises(ValueError, match=r"got preference, which learns from preferences\. Train"):
        setup.students(["dmd2", "preference"], [2])


SMALL = "stepdistill.config.model_at_hand.SMALL"


@pytest.mark.parametrize("method", ["dmd2", "lcm", "pcm", "reflow", "vsd", "f_distill", "tscd"])
def test_a_small_teacher_s_settings_are_those_of_train(tmp_path, tmp_path_factory, method) -> None:
    setup = own(tmp_path, tmp_path_factory)
    argv = ["--pretrained_model_name_or_path", setup.teacher(), "--output_dir", str(tmp_path)]
    run = parse_run_config([*argv, "--method", method], by_size=True).model_dump()
    settings = setup.settings(method)
    for name in ("learning_rate", "role_learning_rates", "train_batch_size", "ema_decay",
                 "max_train_steps", "lr_scheduler", "adam_beta1", "adam_beta2"):  # fmt: skip
        assert settings.get(name, run[name]) == run[name]
    rates = dict.fromkeys(("dmd2", "vsd", "f_distill"), 1e-4) | {"reflow": 6e-4}
    assert settings["learning_rate"] == rates.get(method, 3e-4)  # none of a paper's
    method_options = method_config(settings["method"], settings["method_config"])
    assert method_options == method_config(run["method"], run["method_config"])
    (line,) = (one for one in setup.reasons[method] if one.startswith("recipe small-"))
    assert line.endswith(f"would move nothing (--methods {method}=FILE for another)")


def test_a_large_teacher_s_settings_are_the_method_s_file_under_its_own_guidance(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    monkeypatch.setattr(SMALL, 0)
    settings = own(tmp_path, tmp_path_factory).settings("dmd2")
    assert settings["learning_rate"] == 5e-7
    assert settings["adam_beta2"] == 0.999
    (sd3,) = layers_of("sd3")
    assert settings["method_config"]["guidance"] == stated_for(METHODS["dmd2"], sd3.model)


def test_a_large_teacher_is_settled_and_told_as_train_does_it(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """LCM tells the student its guidance, which SD3 can't be."""
    monkeypatch.setattr(SMALL, 0)
    setup = own(tmp_path, tmp_path_factory)
    argv = ["--config", "lcm", "--pretrained_model_name_or_path", setup.teacher()]
    run = parse_run_config(argv, by_size=True)
    settings = setup.settings("lcm")
    assert settings["method_config"]["embed_guidance"] is False
    options = method_config(settings["method"], settings["method_config"])
    assert options == method_config(run.method, run.method_config)
    assert setup.reasons == {"lcm": run.reasons[1:]}


def test_a_file_is_taken_whatever_the_teacher_s_size(tmp_path, tmp_path_factory) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: dmd2\nlearning_rate: 0.25\n")
    settings = own(tmp_path, tmp_path_factory, methods={"dmd2": str(file)}).settings("dmd2")
    assert settings["learning_rate"] == 0.25
    assert "ema_decay" not in settings


def test_a_small_teacher_s_recipes_follow_its_kind_and_a_user_s_name(
    tmp_path, tmp_path_factory
) -> None:
    for family, loss in (("sd", "huber"), ("sd_v", "l2")):
        teacher = str(teacher_dir(family, tmp_path_factory))
        setup = own(tmp_path, tmp_path_factory)
        setup.own = replace(setup.own, teacher=teacher)
        assert setup.settings("tscd")["method_config"]["loss"] == loss
        told = "loss huber, as the network answers eps" in setup.reasons["tscd"]
        assert told == (loss == "huber")
        named = {name: setup.settings(name) for name in ("rcm", "scm")}
        assert [setup.reasons[name][0].split(",")[0] for name in named] == [
            *("recipe small-rcm", "recipe small-meanflow")
        ]
        assert {values["method"] for values in named.values()} == {"meanflow"}
        assert [values["method_config"].get("matching") for values in named.values()] == [1.0, None]


@pytest.mark.parametrize("name", ["tcd", "ect", "rcm", "progressive", "hyper_sd"])
def test_a_user_s_name_means_in_a_comparison_what_it_means_to_train(
    tmp_path, tmp_path_factory, name
) -> None:
    teacher = str(teacher_dir("sd_v", tmp_path_factory))
    setup = own(tmp_path, tmp_path_factory)
    setup.own = replace(setup.own, teacher=teacher)
    argv = ["--pretrained_model_name_or_path", teacher, "--method", name]
    settings, run = setup.settings(name), parse_run_config(argv, by_size=True)
    assert settings["method"] == run.method
    made = method_config(settings["method"], settings["method_config"])
    assert made == method_config(run.method, run.method_config)


def test_the_name_of_a_file_means_that_file(tmp_path, tmp_path_factory) -> None:
    settings = own(tmp_path, tmp_path_factory).settings("dmd2_lora")
    assert settings["learning_rate"] == layers_of("dmd2_lora")[-1].values["learning_rate"]
    assert settings["tuning"]["student"] == "lora"


@pytest.mark.parametrize(
    ("method", "steps"), [("dmd2", 1), ("dmd2", 4), ("sid", 2), ("vsd", 1), ("ladd", 4), ("add", 4)]
)
def test_a_warm_start_is_made_on_the_pairs_that_are_there(
    tmp_path, tmp_path_factory, method, steps
) -> None:
    setup = own(tmp_path, tmp_path_factory)
    first, last = setup.trainings(Student(method, (steps,)))
    assert (first.settings["method"], first.data) == ("reflow", "pairs")
    options = first.settings["method_config"]
    assert (options["stage"], options["num_steps"]) == ("distill", steps)
    assert (last.settings["method"], last.starts_from) == (method, "student")
    assert last.settings["method_config"]["warm_start"]["updates"] == 0
    assert first.share + last.share == 1.0
    assert first.settings["tuning"] == last.settings["tuning"]


def test_heads_on_pixels_get_a_network_of_the_training_images(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """Another than the judge's; one that a file names stays; of too few images it is refused."""
    made: list[int] = []

    def train(_images: str, out: Path, settings: FeatureSettings) -> Path:
        made.append(settings.seed)
        return out / f"pictures-{settings.seed}"

    monkeypatch.setattr("stepdistill.comparison.user_teacher.train_features", train)
    monkeypatch.setattr("stepdistill.comparison.user_teacher.open_judges", lambda *_: None)
    pictures = image_folder(tmp_path / "pictures", count=16)
    setup = own(tmp_path, tmp_path_factory, train_data_dir=str(pictures))
    _, training = setup.trainings(Student("add", (4,)))
    setup.check([Student("add", (1,)), Student("add", (4,))])
    assert training.lacks_network
    told = [line for line in setup.reasons["add"] if line.startswith("heads on a network of")]
    assert len(told) == 1  # not once a step count
    assert made == []  # nothing before all is checked
    setup.own = replace(setup.own, features=[f"{tmp_path}/net/pictures-1/"])
    network = setup.equipped(training).settings["method_config"]["gan"]["pixels"]["network"]
    assert network == str(tmp_path / "features" / "pictures-2")
    assert made == [1, 2]
    named = training.with_network("mine")
    assert setup.equipped(named) is named
    for more, told in (
        ({}, r"gan\.pixels\.network: expected a folder"),
        ({"train_data_dir": str(image_folder(tmp_path / "few", count=3))}, "expected 16 images"),
    ):
        with pytest.raises(ValueError, match=f"methods: add: .*{told}"):
            own(tmp_path, tmp_path_factory, **more).check([Student("add", (4,))])


def test_a_user_s_file_keeps_its_own_start(tmp_path, tmp_path_factory) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: dmd2\nmethod_config: {guidance: 1.0, warm_start: {updates: 9}}\n")
    setup = own(tmp_path, tmp_path_factory, methods={"mine": str(file)})
    (training,) = setup.trainings(Student("mine", (1,)))
    assert training.settings["method_config"]["warm_start"]["updates"] == 9


def test_the_start_is_ours_whatever_the_user_s_regression_is(tmp_path, tmp_path_factory) -> None:
    file = tmp_path / "raw.yaml"
    file.write_text("method: reflow\nmethod_config: {setup: raw}\n")
    setup = own(tmp_path, tmp_path_factory, methods={"reflow": str(file)})
    first, _ = setup.trainings(Student("dmd2", (1,)))
    assert "setup" not in first.settings["method_config"]
    assert first.settings["learning_rate"] == 6e-4


def test_another_teacher_s_pairs_start_no_one(tmp_path, tmp_path_factory) -> None:
    """Theirs is unguided, or the method asks for other times."""
    for options in ({"guidance": 3.0}, {"student_times": [0.4]}):
        setup = own(tmp_path, tmp_path_factory, settings={"method_config": options})
        (training,) = setup.trainings(Student("dmd2", (1,)))
        assert training.settings["method_config"]["warm_start"]["updates"] > 0


def test_a_warm_start_keeps_its_share_of_a_shorter_run(tmp_path, tmp_path_factory) -> None:
    guided = {"method_config": {"guidance": 3.0}}  # as no pairs are
    setup = own(tmp_path, tmp_path_factory, settings=guided)
    (training,) = setup.trainings(Student("dmd2", (4,)))
    assert training.lasting(70)["method_config"]["warm_start"]["updates"] == 10
    assert training.settings["method_config"]["warm_start"]["updates"] == 100


def test_threads_are_the_user_s_else_shared_by_the_runs(tmp_path, monkeypatch) -> None:
    worker = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]

    def threads(processes: int) -> list[str]:
        run_all(tmp_path, [Student("a", (1,))], [0], processes, worker, lambda line: None)
        return (tmp_path / "logs" / "a_1_seed0.txt").read_text().split()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(2) == ["3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads(1) == ["1"]


def test_step_counts_go_into_the_option_that_means_them(tmp_path, tmp_path_factory) -> None:
    setup = own(tmp_path, tmp_path_factory)

    def option(method: str, name: str) -> object:
        return setup.trainings(Student(method, (2,)))[-1].settings["method_config"][name]

    assert option("dmd2", "num_steps") == 2
    assert option("pcm", "num_phases") == 2
    assert option("lora_guidance", "num_steps") == [2]
    assert option("reflow", "stage") == "distill"


def test_warm_up_shrinks_with_a_short_budget(tmp_path, tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(SMALL, 0)
    (training,) = own(tmp_path, tmp_path_factory).trainings(Student("dmd2", (1,)))
    assert training.settings["lr_warmup_steps"] == 8
    assert training.lasting(50)["lr_warmup_steps"] == 5
    assert training.lasting(50)["max_train_steps"] == 50


def test_a_file_for_train_serves_a_comparison(tmp_path, tmp_path_factory) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: dmd2\npretrained_model_name_or_path: other\noutput_dir: o\nexport_dir: e\n"
        "data: {prompts_file: x}\nvalidation_steps: 5\nvalidation_prompts: [a]\nseed: 7\n"
        "best_metric: teacher_rmse\nmax_train_seconds: 1\nlearning_rate: 0.5\n"
    )
    setup = own(tmp_path, tmp_path_factory, methods={"mine": str(file)})
    setup.check_settings(Student("mine", (1,)))
    (training,) = setup.trainings(Student("mine", (1,)))
    _, args, _ = setup.configs(training, 50)
    assert (args.learning_rate, args.max_train_seconds, args.best_metric) == (0.5, None, None)
    assert (args.output_dir, args.validation_steps) == (str(tmp_path), 0)
    assert "seed" not in training.settings


def test_guidance_that_methods_do_not_share_is_told(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    monkeypatch.setattr(SMALL, 0)
    setup = own(tmp_path, tmp_path_factory)

    def guidance(method: str) -> str:
        return setup.terms(setup.trainings(Student(method, (1,)))[0])["guidance"]

    assert [guidance(name) for name in ("pcm", "dmd2", "reflow")] == ["4", "4.5", "1"]
    same = own(tmp_path, tmp_path_factory, guidance=3.0)
    told = {same.terms(same.trainings(Student(n, (1,)))[0])["guidance"] for n in ("lcm", "reflow")}
    assert told == {"3"}


NET = "evaluation.test_features:Mean"


class Odd(Mean):
    """Of images of another size than the teacher's."""

    name = "odd"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, 3, 7, 7).flatten(1)


COMMAND = ("compare", "--budget", "2steps", "--guidance", "1")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--methods", "dmd2={bad}"], r"methods: dmd2: method_config of dmd2: .*nonsense"),
        (["--methods", "dmd2", "--features", "digits", "digits1"], "digits1"),
        (["--methods", "dmd2", "--teacher", "{no}"], "no"),
        (["--methods", "dmd2", "--processes", "0"], "processes: expected 1 or more, got 0"),
        (["--methods", "dmd2", "--steps", "0"], "steps: expected 1 or more, got 0"),
        (["--methods", "dmd2,reflow", "dmd2={bad}"], "methods: expected different names"),
        (["--methods", "dmd2", "--seeds", "0", "0"], "seeds: expected different ones"),
        (["--methods", "dmd2", "--steps", "1", "4", "--steps", "1"], "steps: expected different"),
        (["--methods", "dmd2", "--features", NET, NET], "features: expected different ones"),
        (
            ["--methods", "dmd2", "--prompts_file", "{no}"],
            "prompts_file: expected a file or folder",
        ),
        (["--methods", "reflow"], "features digits: expected grey images of 8 x 8 px, got"),
        (["--methods", "reflow,dmd2", "--features", NET, "--train_data_dir", "{no}"], "no"),
        (
            ["--methods", "reflow,broken={run}", "--features", NET],
            "methods: broken: .*/no/such/run",
        ),
        (["--methods", "reflow", "--features", NET, "--num_prompts", "9"], "num_prompts: expected"),
        (
            ["--methods", "reflow", "--features", NET, "--reference", "{no}"],
            "reference: expected a",
        ),
        (
            ["--methods", "reflow", "--features", f"{__name__}:Odd"],
            "features odd: expected a network",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(tmp_path, tmp_path_factory, flags, told) -> None:
    bad, prompts, out = tmp_path / "bad.yaml", tmp_path / "prompts.txt", tmp_path / "out"
    bad.write_text("method: dmd2\nmethod_config: {nonsense: 1}\n")
    run = tmp_path / "run.yaml"
    run.write_text("method: dmd2\ninit_student_from: /no/such/run\n")
    prompts.write_text("a red cube\na cat\n")
    command = [*COMMAND, "--teacher", str(teacher_dir("sd3", tmp_path_factory))]
    command += ["--prompts_file", str(prompts), "--output_dir", str(out)]
    command += [] if "--features" in flags else ["--features", "digits"]
    command += [flag.format(bad=bad, run=run, no=tmp_path / "no") for flag in flags]
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        main(command)
    assert not out.exists()


def test_what_is_right_is_not_refused_and_nothing_is_made(tmp_path, tmp_path_factory) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red cube\na cat\n")
    given = UserOptions(str(teacher_dir("sd3", tmp_path_factory)), str(prompts), [NET])
    setup = UserTeacher(out, given)
    setup.check(setup.students(["dmd2", "lcm", "pcm", "reflow", "tscd", "vsd"], (1, 2)))
    assert not out.exists()


def test_pairs_go_on_where_they_were_stopped(tmp_path, tmp_path_factory) -> None:
    setup = own(tmp_path, tmp_path_factory)
    now = iter([0.0, 5.0, 100.0, 102.0])

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.pairs_made(stopped, lambda: next(now))
    setup.pairs_made(lambda: None, lambda: next(now))
    setup.pairs_made(stopped, lambda: 0.0)  # they are there
    assert json.loads((tmp_path / "pairs_seconds.json").read_text()) == 7.0


def test_pairs_are_made_for_those_that_learn_from_them(tmp_path, tmp_path_factory) -> None:
    setup = own(tmp_path, tmp_path_factory)
    assert not setup.needs_pairs([Student("tdm", (2,))])
    assert setup.needs_pairs([Student("tdm", (2,)), Student("dmd2", (2,))])
    assert setup.needs_pairs([Student("lcm", (1,))])  # no images were given


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys) -> None:
    def stopped(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepdistill.cli.compare.compare", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--output_dir", str(tmp_path), "--budget", "1s"])
    assert ended.value.code == 75
    assert "the same call goes on" in capsys.readouterr().err
