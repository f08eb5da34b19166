"""Balanced parts: sizes within one, the router's answer for each point, the least cost."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from stepdistill.data.partition import balanced, balanced_centroids, class_blocks

# n points, K parts.


def points(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    """(n, E) on the sphere, most of them in one heap."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows[: count // 2, 0] += 5
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize(("count", "num_parts"), [(7, 3), (8, 8), (101, 4), (60, 7), (5, 1)])
def test_sizes_differ_by_one_at_most_and_routing_repeats_them(count, num_parts) -> None:
    rows = points(count)
    centroids, offsets = balanced_centroids(rows, num_parts, seed=0)
    chosen = (torch.cdist(rows, centroids).square() + offsets).argmin(1)
    sizes = torch.bincount(chosen, minlength=num_parts)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1


def test_one_seed_gives_one_partition() -> None:
    rows = points(40)
    first, again, other = (balanced_centroids(rows, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_equal_sizes_at_the_least_cost() -> None:
    """Against every assignment of six points to three parts of two."""
    cost = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cost[:, 0] -= 0.8  # all would go there
    parts, offsets = balanced(cost)
    every = {tuple(order) for order in permutations((0, 0, 1, 1, 2, 2))}
    least = min(float(sum(cost[i, k] for i, k in enumerate(order))) for order in every)
    assert float(cost.gather(1, parts[:, None]).sum()) == pytest.approx(least, abs=1e-12)
    assert torch.equal((cost + offsets).argmin(1), parts)


def test_clusters_are_found() -> None:
    """Where clusters are of one size, parts are the clusters."""
    centres = torch.eye(4, dtype=torch.float64).repeat(10, 1)
    rows = centres + 0.05 * points(40, 4)
    centroids, offsets = balanced_centroids(rows, 4, seed=0)
    chosen = (torch.cdist(rows, centroids).square() + offsets).argmin(1).reshape(10, 4)
    assert torch.equal(chosen, chosen[:1].expand(10, 4))
    assert len(set(chosen[0].tolist())) == 4


def test_class_blocks_hold_every_class() -> None:
    assert class_blocks(range(1000), 4) == [0, 250, 500, 750]
    assert class_blocks([7, 3, 3, 9, 12, 20], 2) == [0, 9]
    assert class_blocks([5, 6], 1) == [0]
