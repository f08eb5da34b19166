"""The VAE whose images are judged recomputes its activations: the same gradient, less held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import build_trainer, teacher_dir
from torch import Tensor

from stepdistill.families.registry import load_family
from stepdistill.training import memory
from stepdistill.training.memory import checkpoint_decoder


def gradient(family: Any) -> tuple[Tensor, int]:
    """(of a sum of squared pixels in the latents, bytes that its graph keeps)."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *family.sample_shape(), generator=generator).requires_grad_()
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = family.images(latents).square().sum()
    loss.backward()
    assert latents.grad is not None
    return latents.grad, sum(held.values())


class Args:
    def __init__(self, asked: bool | str) -> None:
        self.gradient_checkpointing = asked


@pytest.mark.parametrize("name", ["sd", "flux2"])
def test_the_gradient_is_the_same_and_less_is_kept(name, tmp_path_factory) -> None:
    family = load_family(teacher_dir(name, tmp_path_factory))
    family.pipeline.vae.requires_grad_(False)
    plain, before = gradient(family)
    checkpoint_decoder(Args(True), family)  # type: ignore[arg-type]
    checkpoint_decoder(Args(True), family)  # type: ignore[arg-type]  # of a second run
    recomputed, after = gradient(family)
    assert torch.equal(plain, recomputed)
    assert after < 0.6 * before


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "asked", "limit", "recomputes"),
    [
        ("sd", "auto", 20_000_000, False),
        ("sd", "auto", 1, True),
        ("sd", False, 1, False),
        ("wan", True, 1, False),
        ("sana", True, 1, False),
        ("edm", True, 1, False),
    ],
)
def test_which_decoders_recompute(name, asked, limit, recomputes, monkeypatch, tmp_path_factory):
    """By size, or as told; never a video's, nor one without blocks that can, nor pixels."""
    monkeypatch.setattr(memory, "AUTO_DECODER", limit)
    family = load_family(teacher_dir(name, tmp_path_factory))
    checkpoint_decoder(Args(asked), family)  # type: ignore[arg-type]
    _, held = gradient(family)
    monkeypatch.setattr(memory, "checkpoint_blocks", lambda *_: pytest.fail("once is enough"))
    again = load_family(teacher_dir(name, tmp_path_factory))
    if not recomputes:
        checkpoint_decoder(Args(asked), again)  # type: ignore[arg-type]
    _, plain = gradient(again)
    assert (held < plain) == recomputes


@pytest.mark.full
def test_a_run_that_judges_images_does_so_and_one_that_does_not_leaves_the_vae(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("stepdistill.training.setup.checkpoint_decoder", lambda *_: calls.append(1))
    teacher = teacher_dir("sd", tmp_path_factory)
    build_trainer("lcm", teacher, "lora", tmp_path / "plain")
    assert calls == []
    build_trainer("lcm_reward", teacher, "lora", tmp_path / "judged")
    assert calls == [1]
