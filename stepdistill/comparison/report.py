"""The comparison's files, written anew after every run: table.md, results.json, results.csv,
samples.png, report.html and, where runs were judged on their way, curves.csv and curves.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepdistill.reporting import page
from stepdistill.reporting.blocks import Block, Strip, Text, Verdicts
from stepdistill.reporting.markdown import plain
from stepdistill.reporting.pictures import Picture, ink
from stepdistill.reporting.plots import save_charts
from stepdistill.reporting.table import Line, Table, write_csv
from stepdistill.reporting.values import counted, decimals

from .charts import quality_charts, training_charts
from .curves import rows_of
from .results import Comparison, read
from .table import Cell, Judged, run_name

FILES = ("table.md", "results.json", "results.csv", "samples.png", "report.html", "curves.csv",
         "curves.png")  # fmt: skip
WAY = (
    "Each student as it was at that part of its run, its average where it keeps one; judging is "
    "not counted as time. A line joins the means, dots are seeds. A point is missing where the "
    "student could not yet be sampled in that many steps. Learning rates follow the whole budget: "
    "a run that is planned shorter may end better than a longer one is at that time."
)


def markdown(compared: Comparison) -> str:
    """The table, a row for each method, Frechet distance with recall in brackets."""
    counts = compared.counts
    columns = [counted(n, "step") for n in counts] or ["why"]  # no run has finished
    lines = [*_lines(compared)]
    lines += [Line("failed", [_failed(one), one["error"]]) for one in compared.failed]
    lines += [Line("", [f"{name}: left out", why]) for name, why in compared.left_out.items()]
    others = [
        f"{'real images' if r.group == 'real' else f'teacher at {steps}'} {_row_text(r)}"
        for r in compared.base
        if r.frechet is not None and r.steps not in counts
        for steps in [counted(r.steps or 0, "step")]
    ]
    if compared.is_reference:
        others.append("to the teacher's own images at its most steps")
    head = (
        "Fréchet distance (recall in brackets), mean ± deviation over training seeds; "
        f"{'; '.join(others)}. {_terms(compared)} {compared.facts}".rstrip()
    )
    advice = [f"- {plain(line)}" for line in compared.advice()]
    return "\n".join([plain(head), "", Table(["", *columns], lines).markdown(), "", *advice, ""])


def _terms(compared: Comparison) -> str:
    """What is the same for every method, and what is its own."""
    same, differ = compared.terms()
    text = "Same teacher, data and budget for every method"
    text += "".join(f", {name} {value}" for name, value in same.items())
    return text + (f"; {', '.join(differ)} by method, see its runs." if differ else ".")


def _failed(one: dict[str, Any]) -> str:
    return f"{run_name(one['recipe'], one['steps'])}, seed {one['seed']}: failed"


def _figures(mean: float, std: float, recall: float | None) -> str:
    """Such as "2.10 ± 0.14 (0.85)"."""
    spread = f"{std:.2f}" if mean >= 1 else f"{std:.2g}"
    text = f"{decimals(mean)} ± {spread}" if std else decimals(mean)
    return text if recall is None or math.isnan(recall) else f"{text} ({recall:.2f})"


def _row_text(row: Judged | None) -> str:
    """Its figures; its deviation is one over noise seeds, and left out."""
    if row is None or row.frechet is None:
        return ""
    return _figures(row.frechet.mean, 0, None if row.recall is None else row.recall.mean)


def _lines(compared: Comparison) -> list[Line]:
    """A text for each step count: the teacher's, then each method's."""
    base = {row.steps: row for row in compared.base if row.group == "teacher"}
    cells = [_row_text(base.get(n)) for n in compared.counts]
    lines = [Line("teacher", ["teacher", *cells])]
    seeds = max((cell.num_seeds for cell in compared.table.values()), default=0)
    for method in compared.methods:
        known = [compared.table.get((method, n)) for n in compared.counts]
        lines.append(Line("student", [method, *(_cell_text(c, seeds) if c else "" for c in known)]))
    return lines


def _cell_text(cell: Cell, seeds: int) -> str:
    """Its figures, and from how many seeds where other cells have more."""
    text = _figures(cell.frechet, cell.std, cell.recall)
    return text if cell.num_seeds == seeds else f"{text}, {cell.num_seeds} of {seeds} seeds"


def _plain(recipe: str, steps: int, cell: Cell) -> dict[str, Any]:
    """A cell for JSON, which knows no NaN."""
    values = {name: None if value != value else value for name, value in asdict(cell).items()}
    return {"recipe": recipe, "steps": steps, **values}


def write(out: Path) -> Comparison:
    """Write the files of what the folder holds."""
    compared = read(out)
    (out / "table.md").write_text(markdown(compared), encoding="utf-8")
    plain = [_plain(recipe, steps, cell) for (recipe, steps), cell in compared.table.items()]
    content = {
        "table": plain,
        "runs": list(compared.runs),
        "failed": list(compared.failed),
        "advice": compared.advice(),
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    failed = [
        {"recipe": one["recipe"], "steps": "/".join(map(str, one["steps"])), "error": one["error"]}
        for one in compared.failed
    ]
    names = ["recipe", "steps", *asdict(Cell(0, 0, 0, 0)), "error"]
    write_csv(out / "results.csv", [*plain, *failed], names)
    if compared.curves:
        save_charts(out / "curves.png", training_charts(compared))
        write_csv(out / "curves.csv", rows_of(compared.curves))
    report(compared).write(out / "report.html", out / "samples.png")
    return compared


def report(compared: Comparison) -> page.Report:
    """The page: advice, table, charts, pictures, runs."""
    heads = ["Fréchet ↓ (recall ↑)", *(counted(n, "step") for n in compared.counts)]
    first, *rest = compared.advice()
    parts = (line.partition(": ") for line in rest)
    advice = [("good", "advice", first, "")]
    advice += [("", steps, sentence, "") for steps, _, sentence in parts]
    note = (
        "Mean ± deviation over training seeds, where there are several. "
        f"{_terms(compared)} {compared.facts}"
    )
    charts = quality_charts(compared)
    sections: list[tuple[str, list[Block]]] = [
        ("Which one?", [Verdicts(advice)]),
        ("Figures", [Table(heads, _lines(compared)), Text(note)]),
    ]
    if compared.table:
        sections.append(("Quality against steps and time", [page.Charts(charts)]))
    if compared.curves:
        way = page.Charts(training_charts(compared))
        sections.append(("Quality while training", [way, Text(WAY)]))
    sections.append(("Samples", [_strip(row) for row in shown(compared)]))
    if compared.failed:
        failed = [Line("failed", [_failed(one), one["error"]]) for one in compared.failed]
        sections.append(("Failed runs", [Table(["run", "error"], failed)]))
    if compared.left_out:
        absent = [Line("", [name, why]) for name, why in compared.left_out.items()]
        sections.append(("Left out", [Table(["method", "why"], absent)]))
    names = [*compared.terms()[0], *compared.terms()[1]]
    runs = [
        Line(
            "",
            [
                run_name(run["method"], run["steps"]),
                str(run["seed"]),
                " + ".join(map(str, run["updates"])),
                f"{run['cpu_seconds']:.0f}",
                *(run.get("terms", {}).get(name, "") for name in names),
            ],
        )
        for run in compared.runs
    ]
    sections.append(("Runs", [Table(["run", "seed", "updates", "seconds", *names], runs)]))
    return page.Report("Methods compared", sections, charts)


def shown(compared: Comparison) -> list[Judged]:
    """The gallery's rows: the teacher's, then the first seed's of each method and step count."""
    first = {(row.label, row.steps): row for row in reversed(compared.students)}
    return [row for row in compared.base if row.steps] + [first[key] for key in compared.table]


def _strip(row: Judged) -> Strip:
    """Two lines of its previews: halves of pictures, or (digits: two of each class after one
    another) one of each class."""
    caption = ""
    if row.frechet is not None:
        recall = "" if row.recall is None else f"  recall {row.recall.mean:.2f}"
        caption = f"Fréchet {decimals(row.frechet.mean)}{recall}"
    previews, half = row.previews, -(-len(row.previews) // 2)
    lines: list[Sequence[Picture]]
    if previews and not isinstance(previews[0], str):
        images = [ink(preview) for preview in previews]
        lines = [images[::2], images[1::2]]
    else:
        lines = [[*previews[:half]], [*previews[half:]]]
    label = f"{row.label}, {counted(row.steps or 0, 'step')}"
    return Strip(row.group, label, caption, [line for line in lines if line])
