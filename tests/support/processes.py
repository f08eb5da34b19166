"""Processes forked from this one, which has imported all they need: a start costs nothing.

No test of a fresh interpreter, of which tests/test_launchers.py and others keep one each.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch.distributed as dist

LIMIT_S = 1800  # one that hangs is killed: far above what a loaded machine needs


def fork(work: Callable[[], None], limit_s: int = 0) -> int:
    """The id of a child that does the work, and leaves with 0, its SystemExit's code or 1."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(limit_s)
        work()
        status = 0
    except SystemExit as stop:
        _flush(sys.stdout)  # before it is told why, as an interpreter does
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        _flush(sys.stdout)
        traceback.print_exc()
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)
        os._exit(status)


def _flush(stream: IO[str]) -> None:
    with suppress(OSError):  # told on a full disk
        stream.flush()


def status_of(child: int) -> int:
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def alone(work: Callable[[], None], stdout: Path, stderr: Path, **env: str) -> None:
    """The work with an environment and outputs of its own; to be forked.

    What Accelerate knows of this process is forgotten.
    """
    from accelerate.state import AcceleratorState, GradientState

    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    work()


def run(
    work: Callable[[], None], cwd: Path | None = None, limit_s: int = LIMIT_S, **env: str
) -> CompletedProcess[str]:
    """What subprocess.run would say of a process that does the work there."""

    def there() -> None:
        if cwd is not None:
            os.chdir(cwd)
        work()

    with TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        status = status_of(fork(partial(alone, there, stdout, stderr, **env), limit_s))
        said = [p.read_text() if p.exists() else "" for p in (stdout, stderr)]
    return CompletedProcess([], status, *said)


class ForkedRun:
    """Popen of `python -m MODULE ARGUMENTS`, as far as a comparison asks it: a child of this
    process, which has imported everything."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stdout: IO[bytes], stderr: IO[bytes]
    ) -> None:
        _, _, module, *arguments = command

        def work() -> None:
            os.environ.clear()
            sys.argv = [module, *arguments]
            begin = partial(runpy.run_module, module, run_name="__main__")
            alone(begin, Path(stdout.name), Path(stderr.name), **env)

        self._child = fork(work)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            child, status = os.waitpid(self._child, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if child else None
        return self.returncode


def forked_ranks(
    world: int, work: Callable[[int], None], out: Path, limit_s: int = LIMIT_S, **env: str
) -> list[int]:
    """Processes with the environment that torchrun gives to each of `world` ranks on one machine.

    What they say is in out/rankRANK.txt.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"ACCELERATE_USE_CPU": "true", **env}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    children = []
    for rank in range(world):
        said = out / f"rank{rank}.txt"
        place = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(fork(partial(alone, partial(work, rank), said, said, **place), limit_s))
    return children


def run_script(path: str | Path, *argv: str) -> None:
    """As `python path argv...` does, in this process."""
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")


class _Absent(MetaPathFinder):
    """The package and its tests can't be found."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] in ("stepdistill", "support"):
            raise ModuleNotFoundError(name)


def run_without_package(code: str, *argv: str) -> None:
    """As `python -c code argv...` in an environment without this package."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("stepdistill", "support")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Absent())
    sys.argv = ["-c", *argv]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


def forked(world: int, work: Callable[[int], None], folder: Path) -> list[int]:
    """Exit statuses by rank of work(rank) of one gloo group (minus the signal of a killed one).

    Args: folder: an empty one, through which they find each other, with stderr as RANK.txt.
    """
    folder.mkdir(parents=True)

    def ranked(rank: int) -> None:
        sys.stderr = (folder / f"{rank}.txt").open("w")
        dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
        work(rank)

    children = [fork(partial(ranked, rank), 120) for rank in range(world)]
    return [status_of(child) for child in children]
