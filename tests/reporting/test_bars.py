"""Bars: the budget that binds, and lines where nobody watches."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from stepdistill.reporting import bars


@pytest.mark.parametrize(
    ("step", "seconds", "budget", "end"),
    [
        (10, 20.0, None, 100),  # steps alone
        (10, 20.0, 1000.0, 100),  # 2 s a step: steps end first
        (10, 20.0, 60.0, 30),  # seconds do
        (0, 0.0, 60.0, 100),  # no rate yet
        (40, 80.0, 60.0, 40),  # over
    ],
)
def test_the_end_is_that_of_the_budget_that_binds(step, seconds, budget, end) -> None:
    assert bars.planned_steps(step, seconds, (0, 0.0), 100, budget) == end


def test_the_rate_is_of_this_process() -> None:
    """A resumed run's first part may have been on another machine."""
    assert bars.planned_steps(60, 510.0, (50, 500.0), 1000, 520.0) == 70


def test_a_log_file_gets_whole_lines_and_nothing_of_short_work(monkeypatch) -> None:
    file = io.StringIO()
    for _ in bars.bar(range(3), file=file, disable=False):
        pass
    assert file.getvalue() == ""
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.0)
    for _ in bars.bar(range(3), file=file, desc="work", disable=False):
        pass
    lines = [line for line in file.getvalue().splitlines() if line]
    assert lines[-1].startswith("work: 100%")
    assert "\r" not in file.getvalue()


def test_a_terminal_that_states_no_width_gets_bars(monkeypatch) -> None:
    """As a new pseudo terminal: 0 rows of 0 columns."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for _ in bars.bar(range(3), desc="work", file=terminal, disable=False):
            pass
        text = os.read(master, 4096).decode()
    os.close(master)
    assert "work: 100%" in text
    assert text.count("\n") == 1  # replaced, not stacked
