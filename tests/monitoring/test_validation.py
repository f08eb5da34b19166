"""Validation's metrics against closed forms, and on a student that is the teacher."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.runs import METHOD_CASES, build_trainer, teacher_dir

from stepdistill.config.metrics import BEST_METRICS, METRICS
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.monitoring.reference import probe_times
from stepdistill.monitoring.sample_metrics import (
    diversity,
    frechet_diagonal,
    movement,
    pooled_features,
    sample_metrics,
    saturation,
    x0_drift,
)
from stepdistill.monitoring.validation import Validator, grid_prompts


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_frechet_of_diagonal_gaussians() -> None:
    """Means 2 apart and deviations 1 and 3 in one feature, equal in the other: 4 + 4."""
    x = torch.tensor([[-1.0, 5.0], [1.0, 5.0]])
    y = torch.tensor([[-1.0, 5.0], [5.0, 5.0]])
    assert frechet_diagonal(x, y) == pytest.approx(8.0)


def test_diversity_is_the_root_mean_square_distance_within_a_prompt() -> None:
    """Per prompt: a pair 2 apart (4), and three samples with pairs 1, 1 and 2 apart (2)."""
    pair = torch.tensor([0.0, 2.0, 10.0, 12.0]).view(4, 1, 1)
    assert diversity(pair, 2) == pytest.approx(2.0)
    three = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    assert diversity(three, 3) == pytest.approx(2.0**0.5)


def test_drift_is_in_the_teachers_units() -> None:
    teacher = 3.0 * normal(8, 2, 8, 8)
    shift, ratio = x0_drift(0.5 * teacher + 6.0, teacher)
    assert ratio == pytest.approx(0.5, rel=1e-5)
    assert shift == pytest.approx(2.0, rel=0.1)


def test_movement_is_the_distance_from_the_first_frame() -> None:
    """Against that of the teacher's videos: 1 for the same, 0 for its first frame held still."""
    ramp = torch.linspace(-0.8, 0.8, 5).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert movement(ramp) == pytest.approx(0.4 * (1 + 2 + 3 + 4) / 4)
    latents, still = normal(2, 4, 2, 4, 4), ramp[:, :, :1].expand_as(ramp)
    made = [sample_metrics(latents, videos, (latents, ramp), 1) for videos in (ramp, still)]
    assert [one["movement_ratio"] for one in made] == [1.0, 0.0]
    assert set(made[0]) <= set(METRICS)
    image = sample_metrics(latents, ramp[:, :, 0], (latents, ramp[:, :, 0]), 1)
    assert "movement" not in image


def test_saturation_counts_black_and_white() -> None:
    assert saturation(torch.tensor([-1.2, -1.0, 0.0, 0.99, 0.999])) == pytest.approx(0.6)


def test_built_in_features_see_place_and_contrast() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[1, :, :4] = 0.5  # its upper half
    features = pooled_features(images)
    assert features.shape == (2, 1 + 4 + 16 + 1)
    assert features[1, :5].tolist() == [0.25, 0.5, 0.5, 0.0, 0.0]
    assert features[1, -1] == pytest.approx(0.252, abs=1e-3)


@pytest.mark.parametrize(
    ("times", "trained", "expected"),
    [
        ((1.0,), (1.0,), (1.0,)),
        ((1.0, 0.5), (1.0, 0.75, 0.5, 0.25), (1.0, 0.5)),
        ((1.0,), (1.0, 0.5, 0.25), (1.0, 0.5, 0.25)),
        ((1.0,), None, uniform_grid(8)),
        (uniform_grid(16), None, uniform_grid(16)[::2]),
    ],
)
def test_probes_are_trained_times(times, trained, expected) -> None:
    assert probe_times(SamplerSpec(times, trained_times=trained)) == expected


OPTIONS = {
    "validation_prompts": ["a", "b"], "validation_steps": 2, "num_validation_images": 2,
    "validation_teacher_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A trainer that has validated before and after two updates."""
    folder = tmp_path_factory.mktemp("run")
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", folder, report_to=["tensorboard"], **OPTIONS)
    trainer.train()
    return trainer


@pytest.mark.full
def test_the_teacher_itself_is_at_distance_zero(validated) -> None:
    trainer = validated
    validator = Validator(trainer.bank, trainer.method, trainer.args)
    times = sorted({*uniform_grid(3), *trainer.method.sampler().times}, reverse=True)
    spec = SamplerSpec(tuple(times), "ode", guidance=trainer.method.config.guidance)
    found = validator.run(trainer.bank["teacher"], spec, step=99).metrics
    assert found["teacher_rmse"] < 1e-5
    assert found["frechet_diagonal"] < 1e-9
    assert found["x0_std_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["diversity_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["saturation_excess"] == 0.0


@pytest.mark.full
def test_a_lines_metrics_are_those_of_its_step_in_file_and_tracker(validated) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = validated.output_dir
    rows = [json.loads(x) for x in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    again = validated.validator.run(
        validated.student(), validated.method.sampler_at(2, 2), 2
    ).metrics
    assert {k: rows[1][k] for k in again} == again
    events = EventAccumulator(str(folder / "stepdistill"))
    events.Reload()
    told = events.Scalars("validation/teacher_rmse")
    assert [point.step for point in told] == [0, 2]
    assert told[1].value == pytest.approx(rows[1]["teacher_rmse"], rel=1e-6)


@pytest.mark.full
def test_the_error_on_the_trajectory_is_of_the_samplers_steps(validated) -> None:
    row = json.loads((validated.output_dir / "validation.jsonl").read_text().splitlines()[0])
    curve = row["trajectory"]
    assert curve["t"] == list(validated.method.sampler().times)
    # Before training the student is the teacher without guidance.
    assert len(curve["student"]) == len(curve["teacher"]) == 2
    assert all(value > 0 for value in curve["student"])


@pytest.mark.full
def test_untrained_student_jumps_as_the_unguided_teacher(validated) -> None:
    """At guidance 1 their errors are the same network's."""
    trainer = validated
    args = trainer.args.model_copy(
        update={"validation_guidance": 1.0, "output_dir": str(trainer.output_dir / "plain")}
    )
    found = Validator(trainer.bank, trainer.method, args).run(
        trainer.bank["teacher"], trainer.method.sampler(), 0
    )
    assert found.trajectory["student"] == pytest.approx(found.trajectory["teacher"], rel=1e-5)


@pytest.mark.full
def test_a_resumed_run_reads_the_teachers_samples(validated, monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("the teacher is solved again")

    monkeypatch.setattr("stepdistill.monitoring.reference.solve_reference", never)
    validator = Validator(validated.bank, validated.method, validated.args)
    fresh = validator.run(validated.student(), validated.method.sampler(), 2)
    rows = (validated.output_dir / "validation.jsonl").read_text().splitlines()
    assert fresh.metrics["teacher_rmse"] == json.loads(rows[1])["teacher_rmse"]
    other = validated.args.model_copy(update={"validation_teacher_steps": 4})
    with pytest.raises(AssertionError, match="solved again"):
        Validator(validated.bank, validated.method, other).run(
            validated.student(), validated.method.sampler(), 2
        )


@pytest.fixture(scope="module")
def vsd(tmp_path_factory):
    """A vsd run after two updates, teacher and fake guided alike."""
    folder = tmp_path_factory.mktemp("vsd")
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = build_trainer("vsd", teacher, "lora", folder, **OPTIONS)
    trainer.train()
    return trainer


@pytest.mark.full
def test_guiding_both_branches_the_student_is_held_against_the_plain_teacher(vsd) -> None:
    """The teacher itself, unguided, is where a vsd student ends: at distance zero."""
    spec = SamplerSpec(uniform_grid(3), "ode")
    folder = str(vsd.output_dir / "again")
    args = vsd.args.model_copy(update={"output_dir": folder})
    found = Validator(vsd.bank, vsd.method, args).run(vsd.bank["teacher"], spec, 9).metrics
    assert found["teacher_rmse"] < 1e-5
    assert not any(name.startswith("guided_") for name in found)


@pytest.mark.full
def test_guided_alike_a_fresh_fake_pushes_nowhere(vsd) -> None:
    """Before any update the fake is the teacher, at the same guidance: no gradient, no lag."""
    rows = [json.loads(x) for x in (vsd.output_dir / "validation.jsonl").read_text().splitlines()]
    assert (rows[0]["fake_lag"], rows[0]["fake_lag_error"]) == (0.0, 0.0)


@pytest.mark.full
def test_the_report_says_how_the_teacher_is_guided(vsd, validated) -> None:
    for run, value, told in ((vsd, 1.0, "without guidance"), (validated, 1.75, "guidance 1.75")):
        assert json.loads((run.output_dir / "run.json").read_text())["teacher_guidance"] == value
        assert f"teacher</h3><span>{told}</span>" in (run.output_dir / "report.html").read_text()


@pytest.mark.full
def test_features_of_ones_own_are_taken(validated) -> None:
    validator = Validator(validated.bank, validated.method, validated.args)
    validator.features = lambda images: images.flatten(1).mean(1, keepdim=True) * 0 + 1
    found = validator.run(validated.student(), validated.method.sampler(), 2)
    assert found.metrics["frechet_diagonal"] == 0.0


ONE_OF_EACH_METHOD = {METHOD_CASES[name].method: name for name in reversed(METHOD_CASES)}.values()


@pytest.mark.sampled("lcm-full", "dmd2-full")
@pytest.mark.sampled_in_full(pairs=False, case=ONE_OF_EACH_METHOD)
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if layout in by_default else (pytest.mark.every,))
        for case in METHOD_CASES
        for layout in ("lora", "full")
        if METHOD_CASES[case].fits("sd", layout)
        # Those that learn from pairs have no teacher of their own, whichever the layout.
        for by_default in [("lora", "full") if "noise" in METHOD_CASES[case].fields else ("full",)]
    ],
)
def test_every_method_is_validated(case, layout, tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        case,
        teacher_dir("sd", tmp_path_factory),
        layout,
        tmp_path,  # two steps: a null prompt's first vsd update is zero, fake and teacher agree
        validation_prompts=["a red cube"],
        validation_steps=METHOD_CASES[case].steps,
        num_validation_images=1,
        validation_teacher_steps=2,
    )
    trainer.train()
    first, last = map(json.loads, (tmp_path / "validation.jsonl").read_text().splitlines())
    assert 0 < last["teacher_rmse"] != first["teacher_rmse"]
    assert "teacher" not in trainer.bank.trained_roles


@pytest.mark.parametrize("family", ["edm", "dit"])
def test_class_ids_are_prompts_of_a_class_conditional_model(
    family, tmp_path, tmp_path_factory
) -> None:
    trainer = build_trainer(
        "lcm", teacher_dir(family, tmp_path_factory), "lora", tmp_path,
        **{**OPTIONS, "validation_prompts": ["1", "2"], "validation_teacher_steps": 0},
    )  # fmt: skip
    assert grid_prompts(trainer.args, trainer.family) == [1, 1, 2, 2]
    found = trainer.validator.run(trainer.student(), trainer.method.sampler(), 0)
    assert found.metrics["diversity"] > 0.0


def test_without_teacher_samples_there_is_a_grid_and_little_else(validated, tmp_path) -> None:
    args = validated.args.model_copy(
        update={"validation_teacher_steps": 0, "output_dir": str(tmp_path)}
    )
    found = Validator(validated.bank, validated.method, args).run(
        validated.student(), replace(validated.method.sampler()), 2
    )
    assert set(found.metrics) == {"saturation", "diversity", "fake_lag", "fake_lag_error"}
    assert [p.name for p in (tmp_path / "validation").iterdir()] == ["step-2.png"]


@pytest.mark.full
@pytest.mark.parametrize("case", ["dmd2", "cd"])
def test_the_metrics_to_choose_by_are_measured(case, tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        case, teacher_dir("sd_v", tmp_path_factory), "lora", tmp_path, **OPTIONS
    )  # fmt: skip
    found = trainer.validator.run(trainer.student(), trainer.method.sampler(), 0).metrics
    assert set(BEST_METRICS) <= set(found) <= set(METRICS)
