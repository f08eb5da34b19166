"""Stop early and cleanly: the time budget, or a cluster that takes its machine back.

SLURM and the like send SIGTERM (some SIGUSR1 first) and kill a while later. The signal is noted,
the step goes on to its end, every rank learns of it, and the run saves and leaves with a status of
its own.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from stepdistill.data.stream import STOP_SIGNALS


class StopRequest:
    """Notes the signals that arrive inside `with`, and lets all ranks agree on stopping.

    preempted: whether a signal, on any rank, has stopped the run.
    status: what a stopped process leaves with, EX_TEMPFAIL of sysexits.h: start it again.
    """

    status = 75

    def __init__(self) -> None:
        self.preempted = False
        self._noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self.preempted = self._noted = False
        # Python delivers signals to the main thread alone, and lets no other set handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._noted = True

    def agreed(
        self, seconds: float, limit: float | None, accelerator: Accelerator
    ) -> tuple[bool, float]:
        """(whether to stop, seconds); call on all ranks at a step boundary.

        Stops where a rank was signalled, or where the ranks' mean clock is past `limit`. All ranks
        get that mean: learning rates that follow the clock must be the same everywhere.
        """
        signalled = float(self._noted)
        if accelerator.num_processes > 1:
            told = torch.tensor([signalled, seconds], device=accelerator.device)
            signalled, seconds = accelerator.reduce(told, reduction="mean").tolist()
        any_late = seconds >= (float("inf") if limit is None else limit)
        any_signal = signalled > 0
        self.preempted = any_signal
        if any_signal:
            accelerator.print(
                f"stopped by a signal: saving, then leaving with status {self.status}. Go on with "
                "--resume_from_checkpoint latest."
            )
        return any_late or any_signal, seconds
