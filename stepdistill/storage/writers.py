"""Which process writes: of what machine, since when, and whether it is still there."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def machine() -> str:
    """This machine, and among its containers the one whose process ids these are."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot; None where not known, and of
    one that has ended and waits for its parent to look."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else others[18]
    except (OSError, IndexError, ValueError):
        return None


def runs(pid: int, since: str | None = None) -> bool:
    """Whether a process of this machine is still there, as far as can be known.

    Args: since: when it had started; none matches any process of that id.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return since in (None, started(pid))
