"""Signals that end a process early, and the launcher whose death does.

SLURM and the like send SIGTERM (some SIGUSR1 first) and kill a while later; people press Ctrl-C.
Where nothing has to be brought to its end, the process leaves at once: `Stopped` unwinds it, what
was half written goes, and the command's status is STATUS. A training loop finishes its step first
(see training/preemption.py).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A cluster that wants its machine back sends these, often to a run's data workers too.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATUS = 75  # EX_TEMPFAIL of sysexits.h: start it again
PARENT = "STEPDISTILL_PARENT"  # the id of the process of ours that started this one
# Set in every process of torchrun and of accelerate launch, which ends when they do.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", PARENT)
_parent = int(os.environ.get(PARENT, os.getppid()))


def _forked() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Stopped(BaseException):
    """A stop signal has come. No Exception: what handles errors lets it pass."""


def orphaned() -> bool:
    """Whether a launcher has started this process and is gone: nobody waits for it any more."""
    return os.getppid() != _parent and any(name in os.environ for name in _LAUNCHERS)


def stop_if_orphaned() -> None:
    """Call between two pieces of a long work that goes on where it was stopped.

    Errors: Stopped where the launcher of this process is gone.
    """
    if orphaned():
        raise Stopped("its launcher is gone")


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], Any], signals: tuple[signal.Signals, ...]
) -> Iterator[None]:
    """Within: these signals go to `handler`, but for a Ctrl-C that this process was told to ignore,
    as jobs in the background are. Does nothing beside the main thread, where Python delivers
    signals and which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    heard = [number for number in signals if not (ignored and number == signal.SIGINT)]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def raise_stopped(number: int, _frame: FrameType | None) -> None:
    """A handler that unwinds what runs."""
    raise Stopped(signal.Signals(number).name)
