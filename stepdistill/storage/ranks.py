"""What the processes of one launch do together or not at all: above all, refuse.

Each checks what it sees of its machine's files. What one of them refuses is refused by all, in the
same words and within seconds: one that refuses before they have met meets the others to say so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.core.stopping import stop_if_orphaned
from stepdistill.storage.owner import owned

if TYPE_CHECKING:
    from accelerate import PartialState

MISTAKES = (ValueError, TypeError, OSError, FloatingPointError)
_WAIT_SECONDS = 2.0  # between two looks at another process's lock
_agreed = False  # whether the processes have told each other once that all checks passed or not


def agreed(work: Callable[[], Any], kinds: tuple[type[Exception], ...] = MISTAKES) -> list[Any]:
    """What each process's `work` returned; call on all processes.

    Errors: on all of them, in the same words, what it has raised of `kinds` on one.
    """
    global _agreed
    if not _together():
        return [work()]
    import torch.distributed as dist

    mine: tuple[Any, str, str]
    cause: Exception | None = None
    try:
        mine = work(), "", ""
    except kinds as err:
        mine, cause = (None, str(err), _kind(err, kinds).__name__), err
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    _agreed = True
    faults = {rank: (text, kind) for rank, (_, text, kind) in enumerate(told) if kind}
    if faults:
        texts = {text for text, _ in faults.values()}
        named = [f"process {rank}: {text}" for rank, (text, _) in faults.items()]
        everyone = len(faults) == len(told) and len(texts) == 1
        name = next(iter(faults.values()))[1]
        kind = next(kind for kind in kinds if kind.__name__ == name)
        raise kind(texts.pop() if everyone else "; ".join(named)) from cause
    return [result for result, _, _ in told]


def process_state() -> PartialState:
    """Accelerate's state of these processes: on the CPU where no GPU is there, or where
    ACCELERATE_USE_CPU says so, which Accelerator reads and PartialState alone does not."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=asked or not torch.cuda.is_available())


def _kind(err: Exception, kinds: tuple[type[Exception], ...]) -> type[Exception]:
    return next(kind for kind in kinds if isinstance(err, kind))


def _together() -> bool:
    """Whether there are several processes; they have met then."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched and "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    if launched and not dist.is_initialized():
        process_state()
    return bool(dist.is_initialized()) and dist.get_world_size() > 1


@contextmanager
def refusing_together() -> Iterator[None]:
    """Within, until all have called `agreed` once: a mistake that one process finds is told to the
    others, which are in `agreed` or will be."""
    try:
        yield
    except MISTAKES as err:
        if _agreed:
            raise
        first = err  # `err` is gone after the clause

        def refuse() -> None:
            raise first

        agreed(refuse)
        raise


@contextmanager
def owned_by_first(
    folder: Path, where: str, wait: Callable[[str], object] | None = None
) -> Iterator[None]:
    """`owned`, by the first process for all of them; call on all processes.

    Args: wait: wait for another process's end, and say so by this; none: that is an error.
    """
    with ExitStack() as stack:
        while True:
            try:
                agreed(lambda: stack.enter_context(owned(folder, where)) if _is_first() else None)
                break
            except ValueError as err:
                if wait is None:
                    raise
                wait(f"waiting: {err}")
                wait = _silent
                stop_if_orphaned()
                time.sleep(_WAIT_SECONDS)
        yield


def _is_first() -> bool:
    if not _together():
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0


def _silent(_line: str) -> None:
    """It was said."""
