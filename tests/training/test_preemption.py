"""All ranks stop at one step, and follow one clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepdistill.training.preemption import StopRequest


def ranks(*told: list[float]) -> Any:
    """An accelerator of several processes, whose others told the same at this boundary."""

    def reduce(mine: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        return torch.stack([mine, *map(torch.tensor, told)]).mean(0)

    return SimpleNamespace(
        num_processes=1 + len(told), device="cpu", reduce=reduce, print=lambda *_: None
    )


@pytest.mark.parametrize(("limit", "stops"), [(None, False), (11.0, True), (11.5, False)])
def test_time_is_the_ranks_mean(limit, stops) -> None:
    assert StopRequest().agreed(10.0, limit, ranks([0.0, 12.0, 0.0])) == (stops, 11.0)


def test_one_signalled_rank_stops_all() -> None:
    stop = StopRequest()
    assert stop.agreed(1.0, None, ranks([1.0, 1.0, 0.0], [0.0, 1.0, 0.0])) == (True, 1.0)
    assert stop.preempted


def test_a_failed_rank_stops_all_and_no_signal_did() -> None:
    stop = StopRequest()
    assert stop.agreed(1.0, None, ranks([0.0, 1.0, 1.0])) == (True, 1.0)
    assert (stop.failed, stop.preempted) == (True, False)


def test_a_rank_without_its_launcher_stops_all(monkeypatch) -> None:
    monkeypatch.setattr("stepdistill.training.preemption.orphaned", lambda: True)
    stop = StopRequest()
    assert stop.agreed(1.0, None, ranks([0.0, 1.0, 0.0])) == (True, 1.0)
    assert stop.preempted


def test_alone_the_clock_is_its_own() -> None:
    assert StopRequest().agreed(0.1, None, ranks()) == (False, 0.1)
