"""`stepdistill particles`: resumed bit for bit, refused in one line, reported."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import commands, page
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.loading.safe_files import read_tensors
from stepdistill.losses.score_options import ScoreGradientConfig
from stepdistill.particles import run as particles_run
from stepdistill.particles.options import ParticleConfig, parse_gradient
from stepdistill.particles.report import saturation, spread
from stepdistill.particles.run import optimise
from stepdistill.particles.voxels import VoxelScene, orbit


def config(kind: str = "vsd", **changes: Any) -> tuple[ScoreGradientConfig, ParticleConfig]:
    options = ParticleConfig(**{"num_particles": 2, "max_steps": 3, **changes})
    return ScoreGradientConfig(kind=kind), options


@pytest.fixture
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd", tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2},
        pytest.param({"parameters": "images", "kind": "csd"}, marks=pytest.mark.full),
        {"parameters": "voxels", "num_particles": 1, "grid_size": 4, "batch_size": 1},
    ],
    ids=["latents", "images", "voxels"],
)
def test_a_call_that_was_cut_off_goes_on_bit_for_bit(
    changes, teacher, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(particles_run, "SAVE_SECONDS", 0.0)  # after every step
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    made = optimise(teacher, ["a cat", "a dog"], *config(**changes), whole)

    def cut(step: int, _loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimise(teacher, ["a cat", "a dog"], *config(**changes), halves, tell=cut)
    again: list[int] = []
    optimise(
        teacher,
        ["a cat", "a dog"],
        *config(**changes),
        halves,
        tell=lambda step, _loss: again.append(step),
    )
    assert again == [2, 3]  # step 1 was the last that was saved
    for name in ("particles", "optimizer", *(["fake"] if changes.get("kind") != "csd" else [])):
        one, other = (read_tensors(f / f"{name}.safetensors") for f in (whole, halves))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    if made.images is not None:
        assert made.images.shape == (4, 3, 16, 16)
    else:
        assert len(made.scenes) == 2


def test_a_finished_call_is_found_again_and_another_one_refused(teacher, tmp_path) -> None:
    where = ([teacher, ["a cat"]], tmp_path / "out")
    few = config(kind="sds", max_steps=1)
    first = optimise(*where[0], *few, where[1])
    steps: list[int] = []
    second = optimise(*where[0], *few, where[1], tell=lambda step, _loss: steps.append(step))
    assert not steps
    assert torch.equal(first.images, second.images)
    start = "^output_dir: expected a new folder"
    for call, odd in {
        "other settings": lambda: optimise(*where[0], *config(kind="csd"), where[1]),
        "other prompts": lambda: optimise(teacher, ["a dog"], *few, where[1]),
        "another teacher": lambda: optimise(*where[0], *few, where[1], teacher="b"),
    }.items():
        with pytest.raises(ValueError, match=rf"{start}.* made with {call}\."):
            odd()


def test_particles_not_drawn_stay_and_drawn_ones_move(teacher, tmp_path) -> None:
    few = config(kind="sds", batch_size=1, max_steps=1)
    optimise(teacher, ["a cat"], *few, tmp_path / "one")
    kept = read_tensors(tmp_path / "one" / "particles.safetensors")
    family = particles_run.ScoreGuidance(teacher, ["a cat"], few[0]).family
    first = particles_run.Particles(family, few[1], 2, torch.device("cpu")).state_dict()
    assert sorted(torch.equal(kept[name], first[name]) for name in first) == [False, True]


FIRST, OWN = commands(page("stepdistill/particles/README.md"))


@pytest.mark.full
def test_the_page_s_command_writes_its_report_and_the_same_call_finds_it(
    teacher, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(teacher.resolve())
    call = [*shlex.split(OWN)[1:], "--num_particles", "3", "--max_steps", "2"]
    call += ["--teacher_steps", "2", "--gradients", "sds:100,bsd", "--output_dir", "out"]
    call += ["--gradient.max_t", "[0, 0.98, 0.5, 2]", "--gradient.weight", "uniform"]
    main(call)
    out = Path("out")
    shown = (out / "report.html").read_text()
    for text in ("sds, guidance 100", "bsd", "teacher, guidance 7.5", "saturated"):
        assert text in shown
    assert shown.count("<img") == 2 * 5  # the page's vsd too; two lines each
    assert (out / "report.png").is_file()
    assert "| bsd |" in (out / "results.md").read_text()
    before = (out / "sds-100" / "particles.safetensors").stat().st_mtime_ns
    main(call)
    assert (out / "sds-100" / "particles.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count(f"report: {out / 'report.html'}") == 2
    with pytest.raises(SystemExit, match=r"^error: output_dir: expected a new folder"):
        main([*call, "--seed", "1"])


@pytest.mark.full
def test_the_page_s_loop_runs(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(teacher.resolve())
    code = re.findall(r"```python\n(.*?)```", page("stepdistill/particles/README.md"), re.DOTALL)[0]
    scene = VoxelScene(4, torch.manual_seed(0))
    first = scene.grid.detach().clone()
    names: dict[str, Any] = {
        "N": 1,
        "renderer": lambda camera: scene(camera, 16, 16),
        "my_cameras": lambda step: orbit(torch.zeros(1), torch.zeros(1)),
        "optimizer": torch.optim.Adam(scene.parameters()),
    }
    exec(code, names)
    assert not torch.equal(scene.grid, first)


@pytest.mark.full
def test_the_command_draws_a_turntable(teacher, tmp_path) -> None:
    call = ["particles", "--pretrained_model_name_or_path", str(teacher), "--prompt", "a cat"]
    call += ["--parameters", "voxels", "--grid_size", "4", "--num_particles", "1"]
    call += ["--gradients", "vsd", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    main(call)
    assert "a turn around the scene" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--gradients", "sdss"], "gradients: expected KIND or KIND:GUIDANCE with one of sds"),
        (["--gradients", "sds:x"], "gradients: expected KIND or KIND:GUIDANCE"),
        (["--gradients", "sds:-1"], "gradients: expected KIND or KIND:GUIDANCE"),
        (["--gradients", "sds", "sds"], "gradients: expected different ones"),
        (["--gradients", "nfsd"], "negative_prompt: expected one with nfsd"),
        (["--gradient.kind", "csd"], "expected known options, got ['gradient.kind']"),
        (["--gradient.min_t", "0.99"], "min_t, max_t: expected 0 < min_t <= max_t"),
        (["--gradient.max_t", "[1, 2]"], "annealed value: expected a number"),
        (["--num_particles", "0"], "num_particles: Input should be greater than or equal to 1"),
        ([], "prompt: expected one or more beside a teacher of yours"),
    ],
)
def test_mistakes_are_one_line_before_weights(flags, rule, teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(particles_run, "ScoreGuidance", None)
    call = ["particles", "--pretrained_model_name_or_path", str(teacher)]
    with pytest.raises(SystemExit) as ended:
        main([*call, "--output_dir", str(tmp_path / "out"), *flags])
    assert "\n" not in str(ended.value)
    assert rule in str(ended.value)


def test_models_that_a_prompt_is_not_enough_for_are_refused(tmp_path_factory, tmp_path) -> None:
    rules = {
        "unet2d": "expected a model that a prompt is enough for",
        "dit": "expected class labels",
    }
    for name, rule in rules.items():
        call = ["--pretrained_model_name_or_path", str(teacher_dir(name, tmp_path_factory))]
        with pytest.raises(SystemExit, match=rule):
            main(["particles", *call, "--prompt", "a", "--output_dir", str(tmp_path / "out")])


def test_gradients_as_they_are_typed() -> None:
    assert [parse_gradient(t) for t in ("vsd", "sds:100")] == [("vsd", None), ("sds", 100.0)]


def test_saturation_and_spread() -> None:
    images = torch.zeros(4, 3, 2, 2)
    images[0, 0, 0] = 1.2  # 2 of 48 values
    images[1] = 1.04
    assert saturation(images) == pytest.approx(2 / 48)
    assert spread(images, ["a", "b", "c", "d"]) is None
    pair = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert spread(pair, ["a", "a"]) == pytest.approx(0.5**0.5)


@pytest.mark.full
def test_digits_are_judged_as_the_demo_s_students_are(tmp_path, monkeypatch, capsys) -> None:
    """An untrained teacher of the demo's kind, known by its record: real first, then as asked."""
    from stepdistill.demo.data import load_digit_splits
    from stepdistill.demo.teacher import TeacherConfig, train_teacher

    train = load_digit_splits().train
    folder = train_teacher(TeacherConfig(max_train_steps=1), train, tmp_path / "t", False).folder
    first = shlex.split(FIRST)[1:]  # its gradients take more than one step
    call = [*first[: first.index("--gradients")], "--pretrained_model_name_or_path", str(folder)]
    call += ["--max_steps", "1", "--teacher_steps", "1", "--gradients", "sds:1"]
    main([*call, "--output_dir", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert lines[0].startswith("|  | Fréchet ↓ | recall ↑ | class accuracy | saturated |")
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["real (train)", "teacher", "teacher, guidance 7.5", "sds, guidance 1"]
    assert float(lines[2].split("|")[3]) > 0.9  # recall of real digits
