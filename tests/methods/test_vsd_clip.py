"""vsd's clamped CLIP loss: per sample, scheduled, and with a gradient through a real decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from support.runs import build_trainer, teacher_dir
from support.score import Leaf, batch_of, student_loss
from torch import Tensor

from stepdistill import TrainConfig, Tuning, VariationalScoreTrainer
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Batch
from stepdistill.losses.rewards import ClampedCLIPConfig, reward_loss
from stepdistill.methods.vsd import VSD, VSDConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# ------------------------------------------------------------------- on analytic teachers
def judge(images: Tensor, by: object) -> Tensor:
    """Stands for CLIP where images are vectors: their mean."""
    return images.mean(dim=1)


def gradient(x0: Tensor, step: int = 0, **clip: object) -> Tensor:
    """The gradient on x0 (B, 2) of a student whose fake is the teacher: VSD's part is zero."""
    path = FlowPath()
    leaf, teacher = Leaf(path, x0), GaussianTeacher(path, 0.6)
    nets = AnalyticNets(
        {"student": leaf, "teacher": teacher, "fake": teacher}, scorers={"clip": judge}
    )
    method = VSD(VSDConfig(clip={"weight": 0.1, **clip}), Setting(path, "x0"))  # type: ignore[arg-type]
    batch = replace(batch_of(len(x0)), prompts=("p",) * len(x0))
    student_loss(method, nets, batch, Ctx(step=step, max_steps=10)).total.backward()
    assert leaf.x0.grad is not None
    return leaf.x0.grad


def test_only_samples_below_tau_are_pushed_each_by_its_share() -> None:
    """tau 0.35 on scores -1, 0.3, 0.4, 3: the batch mean 0.675 is above it, two samples are not."""
    scores = torch.tensor([-1.0, 0.3, 0.4, 3.0], dtype=torch.float64)
    grad = gradient(scores[:, None].expand(4, 2).clone())
    share = -0.1 / (4 * 2)  # weight over batch size and the elements that a score averages
    expected = torch.tensor([share, share, 0.0, 0.0], dtype=torch.float64)[:, None].expand(4, 2)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.1), (5, 0.05), (9, 0.01)])
def test_weight_falls_linearly_with_the_student_step(step: int, weight: float) -> None:
    grad = gradient(torch.zeros(2, 2, dtype=torch.float64), step)
    assert grad.sum().item() == pytest.approx(-weight, rel=1e-6)


def test_a_weight_may_rise_from_zero() -> None:
    clip = ClampedCLIPConfig(weight=0.0, weight_end=0.2)
    assert clip.enabled
    assert [clip.weight_at(step, 4) for step in range(5)] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )


def test_the_clamp_is_before_the_mean() -> None:
    score = torch.tensor([-1.0, 1.0])
    assert reward_loss(score, 0.5).item() == 0.75


def test_off_by_default_it_asks_for_nothing() -> None:
    plain = VSD(VSDConfig(), Setting(FlowPath(), "x0"))
    assert plain.scorers() == {}
    assert "prompts" not in plain.needs
    clip = VSD(VSDConfig(clip={"weight": 0.1}), Setting(FlowPath(), "x0"))  # type: ignore[arg-type]
    assert clip.scorers()["clip"].kind == "clip"
    assert "prompts" in clip.needs


# --------------------------------------------------- on a real tiny pipeline, decoder and CLIP
@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def decoder_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(folder)
    return folder


def trainer(tmp_path: Path, teacher: Path, clip_dir: Path, tau: float, decoder: Path | None):
    return VariationalScoreTrainer(
        str(teacher),
        TrainConfig(
            output_dir=str(tmp_path),
            tuning=Tuning(student="lora", fake="lora", rank=2),
            decoder=None if decoder is None else str(decoder),
        ),
        ["a cat", "a red sofa"],
        method_config={
            "clip": {
                "weight": 0.1,
                "tau": tau,
                "model": f"local-dir:{clip_dir}",
                "pretrained": None,
            }
        },
    )


def student_gradients(run: VariationalScoreTrainer) -> tuple[Batch, dict[str, Tensor], float]:
    """(batch, gradients, clip score) of the first student update: the fake is the teacher still."""
    batch = run.batches({"index": [0, 1], "prompt": ["a cat", "a red sofa"]})
    (phase,) = [p for p in run.method.phases(0) if p.name == "student"]
    run.bank.train_only(phase.trains)
    losses = phase.loss(run.bank, batch, Ctx(phase="student", max_steps=10))
    losses.total.backward()
    grads = {n: p.grad for n, p in run.bank.members("student").items() if p.grad is not None}
    return batch, grads, losses.logs["clip_score"].item()


@pytest.mark.full
@pytest.mark.parametrize("small", [True, False], ids=["tiny_decoder", "vae"])
def test_gradient_reaches_the_student_through_the_decoder(
    small, clip_dir, decoder_dir, tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    run = trainer(tmp_path, teacher, clip_dir, 1.0, decoder_dir if small else None)
    _, grads, score = student_gradients(run)
    assert -1.0 < score < 1.0
    size = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    assert 1e-6 < size < float("inf")
    for part in (run.family.pipeline.vae, run.bank.scorer("clip")):
        assert all(p.grad is None for p in part.parameters())


@pytest.mark.full
def test_no_gradient_where_every_sample_is_above_tau(
    clip_dir, decoder_dir, tmp_path, tmp_path_factory
) -> None:
    run = trainer(tmp_path, teacher_dir("sd", tmp_path_factory), clip_dir, -0.999, decoder_dir)
    _, grads, score = student_gradients(run)
    assert score > -0.999
    assert sum(float(g.abs().sum()) for g in grads.values()) == 0.0


def test_prompts_as_text_are_needed(tmp_path, tmp_path_factory) -> None:
    with pytest.raises(ValueError, match=r"expected batch fields \['cond', 'prompts'\]"):
        build_trainer("vsd_clip", teacher_dir("dit", tmp_path_factory), "lora", tmp_path)


@pytest.mark.full
def test_the_loop_logs_it_beside_the_gradient_size(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    logs = build_trainer("vsd_clip", teacher, "lora", tmp_path).train()
    assert {"student/dm", "student/clip", "student/clip_score"} <= set(logs)
