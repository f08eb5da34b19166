"""Ctx: the same key gives the same numbers; ranks share one global draw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.core.context import DRAW_LAW, Ctx, normal_rows, stable_seed


def test_same_key_same_numbers() -> None:
    a, b = (Ctx(seed=3, step=7, phase="fake", repeat=1, micro=2) for _ in range(2))
    assert torch.equal(a.randn((4, 2)), b.randn((4, 2)))
    assert torch.equal(a.rand(4), b.rand(4))
    assert a.shared_rand() == b.shared_rand()


def test_consecutive_draws_differ() -> None:
    ctx = Ctx()
    assert not torch.equal(ctx.randn((4, 2)), ctx.randn((4, 2)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"phase": "b"}, {"repeat": 1},
                                    {"micro": 1}])  # fmt: skip
def test_every_part_of_the_key_counts(change: dict[str, object]) -> None:
    assert not torch.equal(Ctx().randn((8,)), Ctx(**change).randn((8,)))  # type: ignore[arg-type]


def test_ranks_concatenated_equal_one_process() -> None:
    one = Ctx(seed=5, step=2)
    ranks = [Ctx(seed=5, step=2, rank=r, world_size=3) for r in range(3)]
    for draw in (
        lambda c, n: c.randn((n, 2, 2)),
        lambda c, n: c.rand(n),
        lambda c, n: c.randint(0, 1000, n),
        lambda c, n: c.host_rand(n),
        lambda c, n: c.between((2.0, 6.0), n),
    ):
        assert torch.equal(torch.cat([draw(c, 2) for c in ranks]), draw(one, 6))


def test_shared_numbers_are_the_same_on_ranks() -> None:
    ranks = [Ctx(seed=5, rank=r, world_size=4) for r in range(4)]
    assert len({c.shared_randint(0, 10**9) for c in ranks}) == 1
    assert len({c.shared_rand() for c in ranks}) == 1


def test_shared_draws_do_not_move_per_sample_draws() -> None:
    a, b = Ctx(seed=1), Ctx(seed=1)
    a.shared_randint(0, 5)
    assert torch.equal(a.randn((3,)), b.randn((3,)))


def test_randint_covers_its_range_uniformly() -> None:
    draws = Ctx(seed=2).randint(2, 5, 6000)
    counts = torch.bincount(draws, minlength=5)
    assert counts[:2].sum() == 0
    assert (counts[2:] - 2000).abs().max() < 200  # 5 standard deviations


def test_between_maps_the_uniform_draw_onto_its_bounds() -> None:
    expected = 2.0 + 4.0 * Ctx(seed=4).rand(5)
    assert torch.equal(Ctx(seed=4).between((2.0, 6.0), 5), expected)
    assert Ctx().between((3.0, 3.0), 5) == 3.0


def test_randint_of_a_draw_that_rounds_to_one_is_the_last() -> None:
    ctx = Ctx()
    ctx.rand = lambda bsz: torch.ones(bsz, dtype=torch.float64)  # type: ignore[method-assign]
    assert ctx.randint(2, 5, 2).tolist() == [4, 4]


def test_times_and_default_mean() -> None:
    t = Ctx().times(0.25, 3)
    assert t.tolist() == [0.25] * 3
    assert t.dtype == torch.float64
    x = torch.randn(2)
    assert Ctx().mean_over_ranks(x) is x


def test_stable_seed_is_pinned() -> None:
    """A changed hash would change every resumed run."""
    assert stable_seed("sample", 0, 1) == stable_seed("sample", 0, 1)
    assert stable_seed("a", "b") != stable_seed("ab")
    assert 0 <= stable_seed("x") < 2**63
    assert stable_seed("sample", 0, 0, "", 0, 0) == 6624134308605821597


def test_stratified_fills_every_stratum_on_all_ranks_together() -> None:
    whole = Ctx(seed=3).stratified(8)
    assert sorted((whole * 8).long().tolist()) == list(range(8))
    parts = [Ctx(seed=3, rank=rank, world_size=2).stratified(4) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_stratified_is_uniform_sample_by_sample() -> None:
    first = torch.stack([Ctx(seed=seed).stratified(4)[0] for seed in range(2000)])
    # Mean 1/2 with std 1/sqrt(12 n) = .0065; variance 1/12.
    assert abs(float(first.mean()) - 0.5) < 0.026
    assert abs(float(first.var()) - 1 / 12) < 0.006


class Drawn(TorchDispatchMode):
    """Counts the bytes of what is drawn within."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.randn, torch.ops.aten.normal_):
            self.total += out.numel() * out.element_size()
        return out


VIDEO = (16, 21, 60, 104)  # a latent of Wan's 81 frames at 480 x 832 px
VIDEO_BYTES = 4 * math.prod(VIDEO)


def drawn_bytes(law: int, world_size: int, bsz: int = 2) -> int:
    with Drawn() as drawn:
        ctx = Ctx(rank=0, world_size=world_size, device=torch.device("meta"), draw_law=law)
        if law == 1:
            assert ctx.randn((bsz, *VIDEO)).shape == (bsz, *VIDEO)
            return drawn.total
    # Values are drawn row by row on a device that has some; a smaller latent, in proportion.
    with Drawn() as drawn:
        ctx = Ctx(rank=world_size - 1, world_size=world_size, draw_law=law)
        assert ctx.randn((bsz, *VIDEO[:1])).shape == (bsz, *VIDEO[:1])
    return drawn.total * math.prod(VIDEO[1:])


def test_a_rank_draws_its_own_samples_alone() -> None:
    """At 1, 8, 64 and 512 processes: 16.8 MB; the law before drew 8.6 GB on each of 512."""
    worlds = (1, 8, 64, 512)
    assert [drawn_bytes(DRAW_LAW, world) for world in worlds] == [2 * VIDEO_BYTES] * 4
    assert [drawn_bytes(1, world) for world in worlds] == [2 * w * VIDEO_BYTES for w in worlds]


def test_a_sample_is_keyed_by_its_place_in_the_global_batch() -> None:
    """Whatever the number of processes, and whatever else was drawn of one number a sample."""
    ctx = Ctx(seed=4, step=9, phase="fake", repeat=1, micro=2)
    first, _, second = ctx.randn((3, 2)), ctx.rand(3), ctx.randn((3, 2))
    for draw, rows in enumerate((first, second)):
        seeds = [stable_seed("row", 4, 9, "fake", 1, 2, draw, index) for index in range(3)]
        assert torch.equal(rows, normal_rows((2,), seeds))


def test_rows_are_independent_and_normal() -> None:
    rows = Ctx(seed=1).randn((64, 4096))
    assert abs(float(rows.mean())) < 5 / 512  # sqrt(64 * 4096) = 512
    assert abs(float(rows.var()) - 1) < 5 * math.sqrt(2) / 512
    correlation = torch.corrcoef(rows) - torch.eye(64)
    assert float(correlation.abs().max()) < 5 / 64


def test_the_law_before_draws_what_it_drew() -> None:
    """Runs begun under it go on by it: one generator for all, in the order of the calls."""
    generator = torch.Generator().manual_seed(stable_seed("sample", 0, 0, "", 0, 0))
    ctx = Ctx(rank=1, world_size=2, draw_law=1)
    drawn = torch.randn((4, 3), generator=generator)
    assert torch.equal(ctx.randn((2, 3)), drawn[2:])
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    assert torch.equal(ctx.rand(2), uniform[2:])


def test_draws_on_the_meta_device_have_shapes_alone() -> None:
    ctx = Ctx(device=torch.device("meta"))
    assert ctx.randn((2, 3)).is_meta
    assert ctx.rand(2).is_meta
    assert ctx.stratified(4).shape == (4,)
    assert ctx.host_rand(2).device.type == "cpu"


def test_a_replaced_context_draws_from_its_own_first() -> None:
    """As a method does that gives a part of its loss draws of its own."""
    ctx = Ctx(phase="student")
    ctx.randn((2, 3))
    assert torch.equal(replace(ctx, phase="dm").randn((2, 3)), Ctx(phase="dm").randn((2, 3)))
