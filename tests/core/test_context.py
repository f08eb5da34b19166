"""Ctx: the same key gives the same numbers; ranks share one global draw."""

from __future__ import annotations

import pytest
import torch

from stepdistill.core.context import Ctx, stable_seed


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
