"""Compare a teacher at N steps with students: same prompts, same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepdistill.config.flags import parse_options
from stepdistill.evaluation.options import Options
from stepdistill.evaluation.presets import PRESETS

if TYPE_CHECKING:
    from stepdistill.evaluation.report import Report


def parse(argv: Sequence[str], prog: str) -> Options:
    """The options of an evaluation."""
    presets = [f"  {name}: {one.about}\n    {one.files}" for name, one in PRESETS.items()]
    return parse_options(Options, argv, prog, "\n".join([str(__doc__), "", "presets:", *presets]))


def run(options: Options) -> None:
    from stepdistill.evaluation.run import evaluate

    print_report(evaluate(options))


def print_report(report: Report) -> None:
    """The main numbers in the terminal, by process 0."""
    from accelerate import PartialState
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from stepdistill.evaluation.report import heading, told

    if not PartialState().is_main_process:
        return
    costs = ("seconds_per_image", "seconds_per_video", "network_calls")
    shown = ("frechet", "recall", "score", "motion_drift", *costs)
    first = ("", *report.networks[:1])  # one feature network's; the files hold all
    columns = [
        key
        for key in report.columns()
        if key[0] in shown
        and (key[2] in ("", report.reference) or key[0] == "motion_drift")
        and (key[1] in first or key[0] == "score")
    ]
    table = Table("", box=box.SIMPLE_HEAD)
    for metric, network, _ in columns:
        table.add_column(heading(metric, network if metric == "score" else ""), justify="right")
    for system in report.systems:
        table.add_row(report.name(system), *(told(system.get(*key), key[0]) for key in columns))
    console = Console()
    console.print(table)
    console.print(f"report: {report.folder / 'report.html'}", highlight=False)
