"""Rewards beside any method: whose sample is judged, with which gradient, when; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderTiny
from rewards.test_clip import MODEL, save_tiny
from rewards.test_preference import save_pick
from safetensors.torch import save_file
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir
from support.score import PATHS, Affine, Recorder, batch_of
from torch import Tensor

from stepdistill import PreferenceTrainer, TrainConfig, Tuning
from stepdistill.config.rewards import RewardConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Losses
from stepdistill.families.registry import load_family
from stepdistill.loading.source import ModelSource
from stepdistill.methods.consistency import Consistency, ConsistencyConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.feedback import FeedbackConfig
from stepdistill.methods.tdm import TDM, TDMConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher
from stepdistill.training.rewards import cropped, with_rewards
from stepdistill.training.run_identity import run_facts

FLOW = PATHS["flow"]
ZERO = Losses(torch.zeros((), dtype=torch.float64))


def total(images: Tensor, by: object) -> Tensor:
    return images.sum(dim=1)


def judged(spec: SamplerSpec, seed: int = 0, **reward: Any) -> tuple[Losses, Affine, Recorder]:
    student = Affine(FLOW, torch.eye(2).double(), torch.zeros(2).double())
    seen = Recorder(student)
    nets = AnalyticNets({"student": seen}, scorers={"total": total})
    one = RewardConfig(**{"kind": "total", "weight": 2.0, **reward})
    losses = with_rewards(ZERO, nets, batch_of(), Ctx(seed=seed, phase="student"), spec, [one])
    return losses, student, seen


# --------------------------------------------------------------------- the sample that is judged
def test_a_deterministic_sampler_is_judged_at_its_last_step_alone() -> None:
    spec = SamplerSpec((1.0, 0.5, 0.25), "ode")
    losses, student, seen = judged(spec)
    assert [(float(t[0]), grad) for _, t, _, grad in seen.calls] == [
        (1.0, False), (0.5, False), (0.25, True),
    ]  # fmt: skip
    losses.total.backward()
    x_t = seen.calls[-1][0].double()
    assert student.bias.grad.tolist() == [-2.0, -2.0]
    torch.testing.assert_close(student.weight.grad, -2.0 * x_t.mean(0).expand(2, 2))
    assert float(losses.logs["reward_total"]) == pytest.approx(float(x_t.sum(1).mean()), rel=1e-6)


def test_a_sampler_that_noises_anew_is_judged_at_every_step_in_turn() -> None:
    spec = SamplerSpec((1.0, 0.5, 0.25), "renoise")
    counts = {len(judged(spec, seed)[2].calls) for seed in range(12)}
    assert counts == {1, 2, 3}


def test_a_step_with_a_graph_gives_the_very_sample_of_the_sampler() -> None:
    """With and without `gradient_at`, and through boundary and noise travel."""
    student = Affine(FLOW, torch.tensor([[0.5, 0.2], [0.0, 1.0]]).double(), torch.ones(2).double())
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    for spec in (SamplerSpec((1.0, 0.5), "ode"), SamplerSpec((1.0, 0.5), "tcd", gamma=0.3)):
        given = (student, spec, noise, batch_of(4).cond, None, None, lambda _: noise)
        plain = sample_x0(*given)
        graph = sample_x0(*given, gradient_at=1)
        assert torch.equal(plain, graph)
        assert graph.requires_grad
        assert not plain.requires_grad
        assert sample_x0(*given, gradient_at=0).requires_grad


def test_a_sample_that_the_loss_has_is_judged_in_its_place() -> None:
    student = Recorder(Affine(FLOW, torch.eye(2).double(), torch.zeros(2).double()))
    nets = AnalyticNets({"student": student}, scorers={"total": total})
    x0 = torch.ones(64, 2, dtype=torch.float64, requires_grad=True)
    one = RewardConfig(kind="total", weight=1.0)
    losses = with_rewards(
        replace(ZERO, sample=x0), nets, batch_of(), Ctx(), SamplerSpec((1.0,)), [one]
    )
    losses.total.backward()
    assert student.calls == []
    torch.testing.assert_close(x0.grad, torch.full((64, 2), -1 / 64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("method", "hands_over"),
    [
        (DMD2(DMD2Config(num_steps=2, guidance=1.0), Setting(FLOW, "x0")), True),
        (TDM(TDMConfig(num_steps=2, guidance=1.0), Setting(FLOW, "x0")), False),
        (TDM(TDMConfig(num_steps=2, guidance=1.0, trained_step="last"), Setting(FLOW, "x0")), True),
        (Consistency(ConsistencyConfig(guidance_range=(1, 1)), Setting(FLOW, "x0")), False),
    ],
    ids=["dmd2", "tdm", "tdm_last", "consistency"],
)
def test_a_loss_hands_over_what_sampling_shows(method, hands_over) -> None:
    """Not x0 of an early deterministic step, which no image is made of, nor one of noised data."""
    student = Affine(FLOW, torch.eye(2), torch.zeros(2))
    teacher = GaussianTeacher(FLOW, 0.6)
    nets = AnalyticNets(
        dict.fromkeys(("teacher", "fake", "target"), teacher) | {"student": student}
    )
    batch = replace(batch_of(), x0=torch.zeros(64, 2))
    phase = next(p for p in method.phases(0) if "student" in p.trains)
    losses = phase.loss(nets, batch, Ctx(phase="student"))
    assert (losses.sample is not None) == hands_over
    assert losses.plus(1.0, losses.total).sample is losses.sample


def test_a_watched_score_is_logged_and_has_no_gradient() -> None:
    x0 = torch.ones(64, 2, dtype=torch.float64, requires_grad=True)
    nets = AnalyticNets(
        {}, scorers={"total": total, "other": lambda images, by: -total(images, by)}
    )
    two = [RewardConfig(kind="total", weight=1.0), RewardConfig(kind="other", weight=0.0)]
    given = (nets, batch_of(), Ctx(), SamplerSpec((1.0,)))
    losses = with_rewards(replace(ZERO, sample=x0), *given, two)
    losses.total.backward()
    torch.testing.assert_close(x0.grad, torch.full((64, 2), -1 / 64, dtype=torch.float64))
    assert {k: float(v) for k, v in losses.logs.items()} == {
        "reward_total": 2.0,
        "reward_other": -2,
    }


def test_a_crop_is_a_square_of_the_latents_at_any_place() -> None:
    x = torch.arange(2 * 3 * 6 * 4).view(2, 3, 6, 4)
    corners = {int(cropped(x, 3, Ctx(seed=seed))[0, 0, 0, 0]) for seed in range(60)}
    assert corners == {4 * row + column for row in range(4) for column in range(2)}
    assert cropped(x, 3, Ctx()).shape == (2, 3, 3, 3)
    assert cropped(x, 5, Ctx()).shape == (2, 3, 5, 4)
    assert cropped(x.unsqueeze(2), 3, Ctx()).shape == (2, 3, 1, 3, 3)


# ------------------------------------------------------------------------------- in whole runs
@pytest.mark.full
def test_rewards_leave_a_method_s_own_draws_as_they_were(tmp_path, tmp_path_factory) -> None:
    """A reward that is constant changes nothing, bit for bit; one due every second update is there
    every second."""
    teacher = teacher_dir("sd3", tmp_path_factory)
    flat = {"flat": lambda images, by: 0.0 * images.mean(dim=(1, 2, 3))}
    one = {"kind": "flat", "weight": 1.0, "every": 2}
    students = []
    for name, options in (("plain", {}), ("flat", {"rewards": [one], "scorers": flat})):
        trainer = build_trainer("lcm", teacher, "lora", tmp_path / name, **options)
        trainer.train()
        students.append(fingerprint(trainer.bank.members("student")))
    assert students[0] == students[1]
    lines = (tmp_path / "flat" / "log.jsonl").read_text().splitlines()
    assert [("student/reward_flat" in line) for line in lines] == [True, False]


@pytest.mark.full
def test_a_reward_rises_while_what_is_frozen_stays(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    trainer = build_trainer(
        "feedback", teacher, "full", tmp_path, max_train_steps=10, learning_rate=6e-3,
        method_options={"anchor": 0.0},
    )  # fmt: skip
    frozen = fingerprint(dict(trainer.family.pipeline.vae.named_parameters()))
    trainer.train()
    assert fingerprint(dict(trainer.family.pipeline.vae.named_parameters())) == frozen
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = [line["student/reward_brightness"] for line in lines]
    assert min(scores[-3:]) > max(scores[:3])


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> list[dict[str, Any]]:
    """A reward of each kind that reads prompts or nothing, by tiny networks."""
    folder = tmp_path_factory.mktemp("judges")
    clip = {"model": f"local-dir:{save_tiny(folder / 'clip')}", "pretrained": None}
    save_file(torch.nn.Linear(8, 1).state_dict(), folder / "head.safetensors")
    pick = {"model": str(save_pick(folder / "pick"))}
    weights = str(folder / "clip" / "open_clip_model.safetensors")
    (folder / "tiny-judge.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "tiny-judge.json")
    return [
        {"kind": "clip", "weight": 0.1, "tau": 0.9, "options": clip},
        {"kind": "hps", "weight": 0.1, "options": {"model": "tiny-judge", "pretrained": weights}},
        {"kind": "pickscore", "weight": 0.1, "tau": 0.9, "options": pick},
        {
            "kind": "aesthetic",
            "weight": 0.0,
            "every": 2,
            "options": {**clip, "head": str(folder / "head.safetensors")},
        },
    ]


@pytest.mark.full
def test_every_kind_trains_by_small_decoder_or_vae(judges, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    decoder.save_pretrained(tmp_path / "decoder")
    for name, more in (("vae", {}), ("small", {"decoder": str(tmp_path / "decoder")})):
        given = {"rewards": judges, "scorers": {}, **more}
        trainer = build_trainer("feedback", teacher, "lora", tmp_path / name, **given)
        before = fingerprint(trainer.bank.members("student"))
        trainer.train()
        assert fingerprint(trainer.bank.members("student")) != before
        lines = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        kinds = [{key.partition("reward_")[2] for key in line} - {""} for line in lines]
        assert kinds == [{"clip", "hps", "pickscore", "aesthetic"}, {"clip", "hps", "pickscore"}]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_it_goes_on_from_a_run_and_is_anchored_there(layout, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    first = build_trainer("dmd2", teacher, layout, tmp_path / "first", max_train_steps=1)
    first.train()
    trainer = build_trainer(
        "feedback", teacher, layout, tmp_path / "run", init_student_from=str(tmp_path / "first")
    )
    begun = fingerprint(first.bank.members("student"))
    for role in ("student", "reference"):
        assert fingerprint(trainer.bank.members(role)) == begun
    trainer.train()
    assert fingerprint(trainer.bank.members("reference")) == begun
    assert fingerprint(trainer.bank.members("student")) != begun
    folder = trainer.export(tmp_path / "out")
    assert (folder / "model_index.json").is_file()


def make(teacher: Path, folder: Path, data: Any = None, scorers: Any = None, **options: Any):
    args = TrainConfig(
        output_dir=str(folder), tuning=Tuning(rank=2), disable_progress_bar=True, **options
    )
    return PreferenceTrainer(str(teacher), args, data or ["a cat"], "feedback", scorers=scorers)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "feedback: expected rewards, got none"),
        ([{"kind": "clop", "weight": 1.0}], r"got 'clop'. Nearest: \['clip'"),
        ([{"kind": "lpips", "weight": 1.0}], "a distance of two images"),
        ([{"kind": "hps", "weight": 1.0}], "a local file of HPSv2's weights"),
        ([{"kind": "pickscore", "weight": 1.0, "options": {"model": "./no"}}], "folder of a CLIP"),
        ([{"kind": "clip", "weight": 1.0, "options": {"modle": "x"}}], "scorer clip: modle"),
        ([{"kind": "own", "weight": 1.0, "options": {"a": 1}}], "no options of your own object"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_line_before_weights_load(
    rewards, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    judges = {"own": total} if any(one["kind"] == "own" for one in rewards) else None
    with pytest.raises(ValueError, match=message):
        make(teacher, tmp_path / "run", scorers=judges, rewards=rewards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": [{"kind": "clip", "weight": 0.0}]}, "expected one with a weight above 0"),
        ({"rewards": [{"kind": "clip", "weight": 1.0}] * 2}, r"each kind once, got \['clip'\]"),
        ({"rewards": [{"kind": "clip", "weight": 1.0, "every": 0}]}, "every"),
        ({"rewards": [{"kind": "clip", "weight": -1.0}]}, "weight"),
        ({"rewards": [{"kind": "clip"}]}, "weight"),
        ({"rewards": [{"kind": "clip", "weight": 1.0, "tau": float("nan")}]}, "tau"),
        ({"reward_crop": 8}, "reward_crop: expected rewards beside it"),
    ],
)
def test_what_no_run_may_say(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_score_of_prompts_needs_prompts(tmp_path, tmp_path_factory, no_loading) -> None:
    teacher = teacher_dir("dit", tmp_path_factory)
    data = TinyData(load_family(teacher).sample_shape(), "label", ())
    with pytest.raises(ValueError, match=r"expected batch fields \['cond', 'prompts'\]"):
        make(teacher, tmp_path, data, rewards=[{"kind": "clip", "weight": 1.0}])


def test_a_judge_of_the_method_s_own_is_not_named_twice(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    with pytest.raises(ValueError, match=r"that vsd does not judge by itself, got \['clip'\]"):
        build_trainer(
            "vsd_clip", teacher, "lora", tmp_path, rewards=[{"kind": "clip", "weight": 1.0}]
        )


def test_a_run_goes_on_with_its_own_rewards(tmp_path, tmp_path_factory, no_loading) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    known = run_facts(
        ModelSource.of(teacher),
        "feedback",
        FeedbackConfig(),
        TrainConfig(rewards=[{"kind": "brightness", "weight": 1.0, "tau": 2.0}]),
    )
    (tmp_path / "run.json").write_text(json.dumps({**known, "method_config": {"num_steps": 2}}))
    other = [{"kind": "brightness", "weight": 0.5}]
    with pytest.raises(ValueError, match=r"rewards \[.*'weight': 1.0.* against .*'weight': 0.5"):
        build_trainer(
            "feedback", teacher, "lora", tmp_path, rewards=other, resume_from_checkpoint="latest"
        )


def test_a_crop_as_large_as_the_latents_is_told(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    with pytest.warns(UserWarning, match="reward_crop 64 has no effect"):
        build_trainer("feedback", teacher, "lora", tmp_path, reward_crop=64)
