"""Stop early and cleanly: the time budget, a cluster that takes its machine back, Ctrl-C.

In the loop a signal is noted, the step goes on to its end, every rank learns of it, and the run
saves and leaves with a status of its own. Around it (filling the cache, validation) there is
nothing to bring to an end: `Stopped` is raised there. A second Ctrl-C ends the run at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

from stepdistill.core.stopping import STATUS, STOP_SIGNALS, handling, orphaned, raise_stopped


class StopRequest:
    """Notes the signals that arrive inside `within`, and lets all ranks agree on stopping.

    preempted: whether a signal, on any rank, has stopped the run. failed: whether a rank's own
        error has.
    status: what a stopped process leaves with.
    """

    status = STATUS

    def __init__(self) -> None:
        self.preempted = self.failed = False
        self._noted = self._at_once = False

    @contextmanager
    def within(self) -> Iterator[None]:
        """Around a run: its signals come here."""
        self.preempted = self._noted = self._at_once = False
        with handling(self._note, (*STOP_SIGNALS, signal.SIGINT)):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within: a signal, also one noted before, raises Stopped and no step is waited for."""
        self._at_once = True
        try:
            if self._noted:
                raise_stopped(signal.SIGTERM, None)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        self._noted = True
        if self._at_once:
            raise_stopped(number, frame)

    def agreed(
        self, seconds: float, limit: float | None, accelerator: Accelerator, failed: bool = False
    ) -> tuple[bool, float]:
        """(whether to stop, seconds); call on all ranks at a step boundary.

        Stops where a rank was signalled or has lost its launcher, where one has `failed`, or where
        the ranks' mean clock is past `limit`. All ranks get that mean: learning rates that follow
        the clock must be the same everywhere.
        """
        signalled, broken = float(self._noted or orphaned()), float(failed)
        if accelerator.num_processes > 1:
            flags = torch.tensor([signalled, seconds, broken], device=accelerator.device)
            signalled, seconds, broken = accelerator.reduce(flags, reduction="mean").tolist()
        any_late = seconds >= (float("inf") if limit is None else limit)
        self.failed = broken > 0
        self.preempted = signalled > 0 and not self.failed
        if self.preempted:
            self.tell(accelerator)
        return any_late or signalled > 0 or self.failed, seconds

    def tell(self, accelerator: Accelerator) -> None:
        """A line on the terminal."""
        accelerator.print(
            f"stopped by a signal: saving, then leaving with status {self.status}. Go on with "
            "--resume_from_checkpoint latest."
        )
