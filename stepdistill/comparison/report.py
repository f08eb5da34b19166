"""The comparison's files, written anew after every run: table.md, results.json, results.csv,
samples.png, report.html and, where runs were judged on their way, curves.csv and curves.png."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepdistill.evaluation import page
from stepdistill.evaluation.plots import panel_png, save_page, save_panels

from .curves import rows_of
from .found import Comparison, read
from .pictures import figure, panels, shown, strips, training_panels
from .table import Cell, short

WAY = (
    "Each student as it was at that part of its run, its average where it keeps one; judging is "
    "not counted as time. A line joins the means, dots are seeds. A point is missing where the "
    "student could not yet be sampled in that many steps. Learning rates follow the whole budget: "
    "a run that is planned shorter may end better than a longer one is at that time."
)


def markdown(found: Comparison) -> str:
    """The table, a row for each method, Frechet distance with recall in brackets."""
    counts = found.counts
    columns = [f"{n} step{'s' * (n > 1)}" for n in counts] or ["why"]  # no run has finished
    lines = ["| | " + " | ".join(columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for label, texts in _rows(found):
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    for one in found.failed:
        error = one["error"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {_failed(one)} | {error} |" + " |" * (len(columns) - 1))
    for name, why in found.left_out.items():
        lines.append(f"| {name}: left out | {why} |" + " |" * (len(columns) - 1))
    others = [
        f"{'real images' if r.group == 'real' else f'teacher at {r.steps} steps'} "
        f"{_told(r.frechet.mean, 0, r.recall)}"
        for r in found.base
        if r.frechet is not None and r.steps not in counts
    ]
    if found.is_reference:
        others.append("to the teacher's own images at its most steps")
    head = (
        "Fréchet distance (recall in brackets), mean ± deviation over training seeds; "
        f"{'; '.join(others)}. {_terms(found)} {found.facts}".rstrip()
    )
    advice = [f"- {line}" for line in found.advice()]
    return "\n".join([head, "", *lines, "", *advice, ""])


def _terms(found: Comparison) -> str:
    """What is the same for every method, and what is its own."""
    same, differ = found.terms()
    told = "Same teacher, data and budget for every method"
    told += "".join(f", {name} {value}" for name, value in same.items())
    return told + (f"; {', '.join(differ)} by method, see its runs." if differ else ".")


def _failed(one: dict[str, Any]) -> str:
    return f"{one['recipe']} for {'/'.join(map(str, one['steps']))}, seed {one['seed']}: failed"


def _told(mean: float, std: float, recall: Any) -> str:
    value = getattr(recall, "mean", recall)
    spread = f"{std:.2f}" if mean >= 1 else f"{std:.2g}"
    text = f"{short(mean)} ± {spread}" if std else short(mean)
    return text if value is None or value != value else f"{text} ({value:.2f})"


def _rows(found: Comparison) -> list[tuple[str, list[str]]]:
    """(label, a text for each step count): the teacher's, then each method's."""
    naive = {r.steps: r for r in found.base if r.group == "teacher"}
    rows = []
    teacher = [naive.get(n) for n in found.counts]
    rows.append(
        (
            "teacher",
            [_told(r.frechet.mean, 0, r.recall) if r and r.frechet else "" for r in teacher],
        )
    )
    seeds = max((cell.num_seeds for cell in found.table.values()), default=0)
    for method in found.methods:
        own = [found.table.get((method, n)) for n in found.counts]
        rows.append((method, [_cell_told(c, seeds) if c else "" for c in own]))
    return rows


def _cell_told(cell: Cell, seeds: int) -> str:
    """Its figures, and from how many seeds where other cells have more."""
    told = _told(cell.frechet, cell.std, cell.recall)
    return told if cell.num_seeds == seeds else f"{told}, {cell.num_seeds} of {seeds} seeds"


def _plain(recipe: str, steps: int, cell: Cell) -> dict[str, Any]:
    """A cell for JSON, which knows no NaN."""
    values = {name: None if value != value else value for name, value in asdict(cell).items()}
    return {"recipe": recipe, "steps": steps, **values}


def write(out: Path) -> Comparison:
    """Write the files of what the folder holds."""
    found = read(out)
    (out / "table.md").write_text(markdown(found), encoding="utf-8")
    plain = [_plain(recipe, steps, cell) for (recipe, steps), cell in found.table.items()]
    told = {
        "table": plain,
        "runs": list(found.runs),
        "failed": list(found.failed),
        "advice": found.advice(),
    }
    (out / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        names = ["recipe", "steps", *asdict(Cell(0, 0, 0, 0)), "error"]
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(plain)
        for one in found.failed:
            steps = "/".join(map(str, one["steps"]))
            writer.writerow({"recipe": one["recipe"], "steps": steps, "error": one["error"]})
    save_page(out / "samples.png", "Methods compared", strips(found), panels(found), share=0.74)
    if found.curves:
        save_panels(out / "curves.png", [panel for _, panel in training_panels(found)])
        rows = rows_of(found.curves)
        with (out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (out / "report.html").write_text(render(found), encoding="utf-8")
    return found


def render(found: Comparison) -> str:
    """The page: advice, table, plots, pictures, runs."""
    lines = [
        page.Line("teacher" if label == "teacher" else "student", [label, *texts])
        for label, texts in _rows(found)
    ]
    heads = ["Fréchet ↓ (recall ↑)", *(f"{n} step{'s' * (n > 1)}" for n in found.counts)]
    first, *rest = found.advice()
    told = (line.partition(": ") for line in rest)
    advice = [("good", "advice", first, "")]
    advice += [("", steps, sentence, "") for steps, _, sentence in told]
    small_print = (
        "Mean ± deviation over training seeds, where there are several. "
        f"{_terms(found)} {found.facts}"
    )
    sections = [
        ("Which one?", page.verdicts(advice)),
        ("Figures", page.table(heads, lines) + page.paragraph(small_print)),
    ]
    if found.table:
        about = ("Fréchet distance against steps", "Fréchet distance against training time")
        drawn = [panel_png(panel) for panel in panels(found)]
        charts = page.charts(list(zip(about, drawn, strict=True)))
        sections.append(("Quality against steps and time", charts))
    if found.curves:
        drawn_ways = [(about, panel_png(panel)) for about, panel in training_panels(found)]
        sections.append(("Quality while training", page.charts(drawn_ways) + page.paragraph(WAY)))
    sections.append(("Samples", page.gallery([figure(row) for row in shown(found)])))
    if found.failed:
        failed = [page.Line("failed", [_failed(one), one["error"]]) for one in found.failed]
        sections.append(("Failed runs", page.table(["run", "error"], failed)))
    if found.left_out:
        absent = [page.Line("", [name, why]) for name, why in found.left_out.items()]
        sections.append(("Left out", page.table(["method", "why"], absent)))
    names = [*found.terms()[0], *found.terms()[1]]
    runs = [
        page.Line(
            "",
            [
                f"{run['method']} for {'/'.join(map(str, run['steps']))}",
                str(run["seed"]),
                " + ".join(map(str, run["updates"])),
                f"{run['cpu_seconds']:.0f}",
                *(run.get("terms", {}).get(name, "") for name in names),
            ],
        )
        for run in found.runs
    ]
    sections.append(("Runs", page.table(["run", "seed", "updates", "seconds", *names], runs)))
    return page.render("Methods compared", sections)
