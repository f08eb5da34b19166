"""Every epoch has every row once, and any position is reached at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.core.context import stable_seed
from stepdistill.data.order import BLOCK, EpochOrder


def rows(order: EpochOrder, epoch: int) -> list[int]:
    return [order[epoch * order.size + i] for i in range(order.size)]


@pytest.mark.parametrize(
    ("shards", "window"),
    [((5, 9, 3, 7), 10), ((5, 0, 9, 0, 3), 4), ((1,) * 30, 7), ((40,), 8), (None, 100)],
)
def test_an_epoch_has_every_row_once(shards, window) -> None:
    size = 60 if shards is None else sum(shards)
    order = EpochOrder(size, 3, shards, window)
    for epoch in range(3):
        assert sorted(rows(order, epoch)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    one, other = (EpochOrder(24, seed, (5, 9, 3, 7), 10) for seed in (0, 1))
    assert len({tuple(rows(order, epoch)) for order in (one, other) for epoch in (0, 1)}) == 4


def test_any_position_is_reached_at_once() -> None:
    order = EpochOrder(24, 3, (5, 9, 3, 7), 10)
    whole = [order[i] for i in range(72)]
    for place in np.random.default_rng(0).permutation(72):
        assert EpochOrder(24, 3, (5, 9, 3, 7), 10)[int(place)] == whole[place]


def test_a_window_holds_whole_shards_next_to_each_other() -> None:
    """Eight shards of 10, windows of 20: each stretch of 20 positions reads two shards alone."""
    order = EpochOrder(80, 0, (10,) * 8, 20)
    found = [{row // 10 for row in rows(order, 0)[i : i + 20]} for i in range(0, 80, 20)]
    assert [len(shards) for shards in found] == [2, 2, 2, 2]


def test_a_small_set_is_shuffled_whole() -> None:
    generator = torch.Generator().manual_seed(stable_seed("epoch", 5, 2))
    assert rows(EpochOrder(50, 5), 2) == torch.randperm(50, generator=generator).tolist()


def test_blocks_of_a_large_set_are_mixed() -> None:
    """More than one window: an epoch is whole, and a window draws blocks from all over the set."""
    size = 40 * BLOCK + 17
    order = EpochOrder(size, 0, window=4 * BLOCK)
    assert np.array_equal(np.sort(rows(order, 1)), np.arange(size))
    first = {row // BLOCK for row in rows(order, 0)[: 4 * BLOCK]}
    assert max(first) - min(first) > 10
