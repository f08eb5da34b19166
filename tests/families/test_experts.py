"""Two experts (Wan 2.2 A14B): whose row is whose, and that a pair of equals is one network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.families.experts import Experts
from stepdistill.families.family import Family
from stepdistill.families.wan import WanFamily
from stepdistill.families.wan_i2v import WanImageToVideoFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny_video import tiny_wan, tiny_wan_i2v

KINDS = {"wan": (WanFamily, tiny_wan, 0.875), "wan_i2v": (WanImageToVideoFamily, tiny_wan_i2v, 0.9)}


def pair(kind: str = "wan") -> Family:
    family, tiny, boundary = KINDS[kind]
    return family(tiny(boundary_ratio=boundary))


def experts(family: Family) -> Experts:
    assert isinstance(family.net, Experts)
    return family.net


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_stock_call(kind) -> None:
    rows = check_family(pair(kind))
    assert {name: value for name, value in rows if not value < LIMIT} == {}


class Swapped(WanFamily):
    def __init__(self, pipeline) -> None:
        super().__init__(pipeline)
        nets = experts(self)
        nets.high, nets.low = nets.low, nets.high


class OneBoundary(WanFamily):
    def __init__(self, pipeline) -> None:
        super().__init__(pipeline)
        experts(self).boundary = 500.0


@pytest.mark.full
@pytest.mark.parametrize(("wrong", "row"), [(Swapped, "denoiser"), (OneBoundary, "sampling")])
def test_check_finds_the_wrong_expert(wrong, row) -> None:
    found = [n for n, v in check_family(wrong(tiny_wan(boundary_ratio=0.875))) if not v < LIMIT]
    assert any(name.startswith(row) for name in found)


def test_each_row_goes_where_its_time_sends_it() -> None:
    """The boundary itself is the high expert's, as in the stock call."""
    family = pair()
    nets, cond = experts(family), family.encode(["a", "b", "c", "d"])
    x = torch.randn(4, 4, 2, 4, 8)
    times = torch.tensor([999.0, 100.0, 875.0, 874.9]).double()
    with torch.no_grad():
        out = family.forward(nets, x, times, cond)
        for row, expert in enumerate((nets.high, nets.low, nets.high, nets.low)):
            one = slice(row, row + 1)
            alone = family.forward(expert, x[one], times[one], cond.slice(row, row + 1))
            assert torch.allclose(out[one], alone, atol=1e-5), row


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_are_one_transformer_bit_for_bit(kind) -> None:
    cls, tiny, boundary = KINDS[kind]
    two = tiny(boundary_ratio=boundary)
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    one = copy.copy(two)
    one.register_modules(transformer_2=None)
    one.register_to_config(boundary_ratio=None)
    made = []
    for pipeline in (one, two):
        family = cls(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
        cond, x = family.encode(["a", "b"]), torch.ones(2, 4, 2, 4, 8)
        with torch.no_grad():
            calls = [
                teacher(x, torch.full((2,), t).double(), cond, family.null(2), 3.0).raw
                for t in (1.0, 0.5)
            ]
        generator = torch.Generator().manual_seed(0)
        made.append([family.stock_call(["a"], 3.0, 4, generator), *calls])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


def test_experts_of_two_architectures_are_refused() -> None:
    pipeline, i2v = tiny_wan(boundary_ratio=0.875), tiny_wan_i2v(boundary_ratio=0.9)
    pipeline.register_modules(transformer_2=i2v.transformer_2)
    with pytest.raises(ValueError, match=r"another \['in_channels'\]"):
        WanFamily(pipeline)


def test_a_pair_that_is_none_is_refused() -> None:
    pipeline = tiny_wan(boundary_ratio=0.875)
    pipeline.register_modules(transformer_2=None)
    with pytest.raises(ValueError, match=r"boundary_ratio 0\.875 without transformer_2"):
        WanFamily(pipeline)
    with pytest.raises(ValueError, match=r"boundary_ratio 0\.875 without transformer_2"):
        WanFamily.nets_in(pipeline.config)


def test_heads_have_no_block_of_two_to_read() -> None:
    roles = {"disc": Role(source="head", train=True, features=("mid",))}
    with pytest.raises(ValueError, match="expected feature blocks of wan"):
        RoleBank(pair(), roles, Tuning())


@pytest.mark.parametrize("layout", ["lora", "full"])
def test_an_update_reaches_the_experts_that_were_asked(layout) -> None:
    family = pair()
    bank = RoleBank(family, {"student": Role(train=True)}, Tuning(student=layout, rank=2))
    with torch.no_grad():
        for param in bank.members("student").values():
            param.add_(torch.randn_like(param), alpha=0.05)
    cond, x = family.encode(["a", "b"]), torch.randn(2, 4, 2, 4, 8)

    def reached(*times: float) -> set[str]:
        for param in bank.members("student").values():
            param.grad = None
        pred: Tensor = bank["student"](x, torch.tensor(times).double(), cond).raw
        pred.square().mean().backward()
        graded = [n for n, p in bank.members("student").items() if p.grad is not None]
        return {name.partition(".")[0] for name in graded}

    assert reached(1.0, 0.9) == {"high"}
    assert reached(0.5, 0.2) == {"low"}
    assert reached(0.5, 0.9) == {"high", "low"}
