"""The promises of the stream, for every source: nothing twice, nothing lost, resumed exactly."""

from __future__ import annotations

import pickle

import pytest
from support.samples import COUNT, KINDS, batches, dataset_of

EPOCH = COUNT // 4  # global batches of two ranks times two samples


@pytest.fixture(params=KINDS)
def dataset(request, tmp_path):
    return dataset_of(request.param, tmp_path)


@pytest.mark.sampled("prompts")
def test_ranks_and_workers_see_every_sample_once(dataset) -> None:
    ranks = [
        list(batches(dataset, 2 * EPOCH, rank=rank, world_size=2, num_workers=2)) for rank in (0, 1)
    ]
    for epoch in (0, 1):
        own = slice(epoch * EPOCH, (epoch + 1) * EPOCH)
        seen = [n for rank in ranks for batch in rank[own] for n in batch]
        assert sorted(seen) == list(range(COUNT))
    assert ranks[0][:EPOCH] != ranks[0][EPOCH:]


def test_ranks_are_parts_of_one_process(dataset) -> None:
    whole = list(batches(dataset, 2 * EPOCH, batch=4))
    ranks = [list(batches(dataset, 2 * EPOCH, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


@pytest.mark.full
@pytest.mark.parametrize("start", [3, 14])
def test_resume_in_an_epoch_with_workers(dataset, start) -> None:
    """24 samples in batches of 5: an epoch ends within a batch."""
    whole = list(batches(dataset, 20, batch=5))
    assert list(batches(dataset, 20 - start, batch=5, start=start, num_workers=2)) == whole[start:]


def test_a_copy_sent_to_another_process_is_the_same(dataset) -> None:
    """Workers that are started and not forked get it pickled."""
    copy = pickle.loads(pickle.dumps(dataset))
    assert list(batches(copy, EPOCH)) == list(batches(dataset, EPOCH))
