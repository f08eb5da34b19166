"""The `stepdistill` command: each file of this folder is one of its commands.

A file holds Options, the command's flags as a pydantic model, and run(options); its docstring's
first line is its help. Files and flags are read by one mechanism (config/flags.py). Heavy imports
happen inside run, so that --help and mistyped options are answered at once. (Here `list` is the
command, once it is imported.)
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path

IN_RANKS = (
    "train",
    "multi_student",
    "cache",
    "pairs",
    "evaluate",
)  # that a launcher may start in several processes
USAGE = "usage: stepdistill COMMAND [--config FILE ...] [--flag value ...]"


@cache
def commands() -> dict[str, str]:
    """Command -> its line of help, read from the files without importing one."""
    modules = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        modules[path.stem] = text.splitlines()[0]
    return modules


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; a user's mistake ends with one line and status 1, a stop
    signal or Ctrl-C with one line and status 75."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    known = commands()
    if name in ("-h", "--help"):
        width = max(map(len, known)) + 2
        lines = [f"  {command:{width}}{line}" for command, line in known.items()]
        print("\n".join([USAGE, "", *lines, "", "stepdistill COMMAND --help lists its flags."]))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        sys.exit(f"error: expected a command, got {name!r}. Nearest: {', '.join(near)}.")
    from stepdistill.config.flags import (
        CommandOptions,
        ending_early,
        mistakes_in_one_line,
        parse_options,
    )
    from stepdistill.config.places import check_places
    from stepdistill.config.run import RunConfig
    from stepdistill.loading.quiet import quieten
    from stepdistill.storage.ranks import refusing_together

    quieten()
    together = refusing_together() if name in IN_RANKS else nullcontext()
    with mistakes_in_one_line(), ending_early(), together:
        module = import_module(f"{__name__}.{name}")
        parse = getattr(module, "parse", None)
        if parse is not None:
            options = parse(rest, f"stepdistill {name}")
        else:
            options = parse_options(
                module.Options, rest, f"stepdistill {name}", str(module.__doc__)
            )
        if isinstance(options, CommandOptions) and not isinstance(options, RunConfig):
            check_places(options)  # those of runs parse has looked at
        status = module.run(options)
    if status is not None:
        sys.exit(status)
