"""Skip-layer guidance: the null pass of a guided call leaves some transformer blocks out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.score import BSZ, VP, Leaf, batch_of, make, student_loss
from torch import Tensor, nn

from stepdistill import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


def calls(family: Family, bank: RoleBank) -> tuple[Tensor, Tensor, Cond, Cond]:
    x_t = torch.randn((2, *family.sample_shape()), generator=torch.Generator().manual_seed(0))
    prompts = [0, 1] if family.conditioning == "label" else ["one", "two"]
    return x_t, torch.full((2,), 0.5).double(), family.encode(prompts), family.null(2)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("sd3", "transformer_blocks"), ("wan", "blocks"), ("dit", "transformer_blocks")],
)
def test_the_null_pass_is_that_of_the_network_without_the_block(
    name: str, blocks: str, make_family: Callable[[str], Family]
) -> None:
    family = make_family(name)
    bank = RoleBank(family, make(VP).roles(), Tuning(rank=2))
    x_t, t, cond, null = calls(family, bank)
    teacher = bank["teacher"]
    with torch.no_grad():
        plain = teacher(x_t, t, cond, null, 3.0).raw
        skipped = teacher.skipping(("block.1",))(x_t, t, cond, null, 3.0).raw
        assert torch.equal(teacher(x_t, t, cond, null, 3.0).raw, plain)  # nothing is left behind
        with_cond = teacher(x_t, t, cond).raw
        whole = getattr(family.net, blocks)
        setattr(family.net, blocks, nn.ModuleList([*whole[:1], *whole[2:]]))
        shorter = teacher(x_t, t, null).raw
        setattr(family.net, blocks, whole)
    expected = shorter + 3.0 * (with_cond - shorter)
    torch.testing.assert_close(skipped, expected.to(skipped), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(skipped, plain, rtol=1e-2)


@pytest.mark.full
@pytest.mark.parametrize(("name", "block"), [("sd3", "block.99"), ("sd_v", "mid")])
def test_only_transformer_blocks_can_be_left_out(
    name: str, block: str, make_family: Callable[[str], Family]
) -> None:
    family = make_family(name)
    bank = RoleBank(family, make(VP).roles(), Tuning(rank=2))
    x_t, t, cond, null = calls(family, bank)
    with pytest.raises(ValueError, match=f"skip_layers: expected transformer blocks of .*{block}"):
        bank["teacher"].skipping((block,))(x_t, t, cond, null, 3.0)


class Skipped(GaussianTeacher):
    """Without its block a conditional mean is twice as far out."""

    gain = 1.0

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.gain * super().posterior_mean(x_t, t, cond)

    @contextmanager
    def without(self, blocks: object) -> Iterator[None]:
        assert blocks == ("block.7",)
        self.gain = 2.0
        yield
        self.gain = 1.0


def test_the_students_gradient_is_of_the_teacher_guided_so() -> None:
    """Fake and teacher alike, g = 3: the gradient is -2 (cond - 2 null)."""
    leaf = Leaf(VP, torch.zeros(BSZ, 2).double())
    fake = GaussianTeacher(VP, 0.6)
    nets = AnalyticNets({"student": leaf, "teacher": Skipped(VP, 0.6), "fake": fake})
    method = make(VP, guidance=3.0, weight="uniform", skip_layers=("block.7",))
    batch, again = batch_of(), Ctx(phase="student")
    student_loss(method, nets, batch, Ctx(phase="student")).total.backward()
    sample = method.sample(nets, batch, again)
    x_t, t, _ = method.noised(again, sample, method.config.dm_t_range)
    cond, null = fake(x_t, t, batch.cond).x0, fake(x_t, t, batch.null).x0
    expected = -2.0 * (cond - 2.0 * null) / leaf.x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected.detach(), rtol=1e-5, atol=1e-9)
