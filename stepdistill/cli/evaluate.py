"""Compare a teacher at N steps with students: same prompts, same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.config.flags import parse_options
from stepdistill.evaluation.options import Options
from stepdistill.evaluation.presets import PRESETS

if TYPE_CHECKING:
    from stepdistill.evaluation.report import Report


def parse(argv: Sequence[str], prog: str) -> Options:
    """The options of an evaluation."""
    presets = [f"  {name}: {one.about}\n    {one.files}" for name, one in PRESETS.items()]
    about = "\n".join([str(__doc__), "", "presets:", *presets])
    return parse_options(Options, argv, prog, about)


def run(options: Options) -> None:
    from stepdistill.demo.classifier import register_digits
    from stepdistill.evaluation.report import FILES
    from stepdistill.evaluation.run import evaluate
    from stepdistill.storage.folders import refuse_written_on
    from stepdistill.storage.ranks import owned_by_first

    register_digits()
    out = Path(options.output_dir)
    if not (out / "features").is_dir():
        refuse_written_on(out, FILES, "output_dir")
    with owned_by_first(out, "output_dir"):
        print_report(evaluate(options))


def print_report(report: Report) -> None:
    """The main numbers in the terminal, by process 0."""
    from accelerate import PartialState
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stepdistill.evaluation.report import heading, value_text

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
        cells = (value_text(system.get(*key), key[0]) for key in columns)
        table.add_row(escape(report.name(system)), *cells)
    console = Console()
    console.print(table)
    console.print(f"report: {report.folder / 'report.html'}", highlight=False, markup=False)
