"""What Qwen-Image does that no other family does: norm-keeping guidance, padded prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.families.qwen_image import QwenImageFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny_video import LATENTS, tiny_qwen_image


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1.0, 0.5]).double()


class LinearGuidance(QwenImageFamily):
    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        return Family.guide(self, cond, null, guidance)


class UnevenNull(QwenImageFamily):
    def null(self, bsz: int) -> Cond:
        return self.encode([""]).repeat(bsz)


class WrongLength(QwenImageFamily):
    def encode(self, prompts) -> Cond:
        cond = super().encode(prompts)
        return Cond({**cond.tensors, "length": cond["length"] + 1})


class OneScale(QwenImageFamily):
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().latents(images, generator).roll(1, dims=1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        (LinearGuidance, "sampling"),
        (UnevenNull, "sampling"),
        (WrongLength, "encode"),
        (OneScale, "vae"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, row) -> None:
    found = [name for name, value in check_family(wrong(tiny_qwen_image())) if not value < LIMIT]
    assert any(name.startswith(row) for name in found)


@pytest.mark.parametrize("guidance", [4.0, torch.tensor([4.0, 1.0])])
def test_guided_tokens_keep_the_conditional_norm(guidance) -> None:
    family = QwenImageFamily(tiny_qwen_image())
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    x, t = inputs()
    cond, null = family.encode(["a", "two cats"]), family.null(2)
    with torch.no_grad():
        guided, plain = teacher(x, t, cond, null, guidance).raw, teacher(x, t, cond).raw
    norms = [family.pack(out).norm(dim=-1) for out in (guided, plain)]
    assert torch.allclose(*norms, rtol=1e-5)
    assert float((guided[0] - plain[0]).abs().max()) > 1e-3
    if isinstance(guidance, Tensor):  # the second row asks for none
        assert torch.allclose(guided[1], plain[1], atol=1e-5)


def test_a_row_does_not_depend_on_the_length_of_another() -> None:
    family = QwenImageFamily(tiny_qwen_image())
    x, t = inputs()
    short, long = family.encode(["a"]), family.encode(["a long prompt of many letters"])
    with torch.no_grad():
        both = family.forward(family.net, x, 1000 * t, Cond.cat([short, long]))
        alone = family.forward(family.net, x[:1], 1000 * t[:1], short)
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_latents_are_scaled_by_channel() -> None:
    family = QwenImageFamily(tiny_qwen_image())
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = family.pipeline.vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(LATENTS[k]).view(1, 4, 1, 1) for k in LATENTS)
    assert torch.allclose(family.latents(images), (z - mean) / std, atol=1e-6)
