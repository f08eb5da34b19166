"""The evaluation's files: report.json, report.csv (a line for each number, its protocol beside it),
report.png and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.reporting import page
from stepdistill.reporting.blocks import Block, Facts, Strip, Text
from stepdistill.reporting.charts import Chart, Curve
from stepdistill.reporting.style import COLOUR, CYCLE
from stepdistill.reporting.table import Line, Table, write_csv
from stepdistill.reporting.values import Measured, counted

from .metrics import COST, LOOK, METRICS, OVER_TIME, QUALITY, System
from .protocol import images_text, protocol_line

FILES = ("report.json", "report.csv", "report.html", "report.png")
REFERENCES = {"real": "real images", "teacher": "the teacher's images"}
Key = tuple[str, str, str]  # metric, network, reference


@dataclass(frozen=True)
class Report:
    """All that the files show. reference: what quality is measured against, "real" or "teacher"."""

    title: str
    systems: Sequence[System]
    protocol: Mapping[str, Any]
    reference: str
    networks: Sequence[str]
    folder: Path

    def name(self, system: System) -> str:
        """A system with its steps."""
        if system.steps is None:
            return system.label
        return f"{system.label}, {counted(system.steps, 'step')}"

    def columns(self) -> list[Key]:
        """(metric, network, reference) of each number that any system has, in METRICS' order."""
        keys = {(n.metric, n.network, n.reference) for s in self.systems for n in s.numbers}
        order = {metric: index for index, metric in enumerate(METRICS)}
        return sorted(keys, key=lambda key: (order[key[0]], key[2] != self.reference, key))

    def quality(self, system: System) -> Measured | None:
        """The Frechet distance that the gallery and the chart show."""
        return system.get("frechet", self.networks[0], self.reference)

    def page(self) -> page.Report:
        """Gallery, chart, tables and protocol."""
        note = (
            f"Quality is measured against {self.protocol['reference']}. Same prompts and same "
            "noise for every row; mean ± deviation over noise seeds where there are several. "
            "Compare a Fréchet distance only with one of the same protocol."
        )
        charts = _charts(self)
        sections: list[tuple[str, Sequence[Block]]] = [
            ("Samples", [_strip(self, system) for system in self.systems]),
            *(("Quality against steps", [page.Charts([chart])]) for chart in charts),
            *_tables(self),
            ("Protocol of every figure", [Facts(protocol_facts(self)), Text(note)]),
        ]
        return page.Report(self.title, sections, charts)


def value_text(value: Measured | None, metric: str) -> str:
    """A value as the tables show it; a dash where there is none."""
    if value is None:
        return "–"
    shown = METRICS[metric]
    small = metric == "frechet" and abs(value.mean) < 1
    return value.text(".3g" if small else shown.form, shown.factor)


def heading(metric: str, network: str) -> str:
    """A column's heading, with an arrow towards the better."""
    shown = METRICS[metric]
    name = network if metric == "score" else f"{network} {shown.heading}".strip()
    return name if shown.higher is None else f"{name} {'↑' if shown.higher else '↓'}"


def write_report(report: Report, folder: Path) -> None:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "title": report.title,
        "reference": report.reference,
        "protocol": dict(report.protocol),
        "systems": [system.plain() for system in report.systems],
    }
    (folder / "report.json").write_text(json.dumps(plain, indent=1, default=str) + "\n")
    write_csv(folder / "report.csv", _csv_rows(report))
    report.page().write(folder / "report.html", folder / "report.png")


def _csv_rows(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "system": system.label,
            "group": system.group,
            "steps": system.steps or "",
            "metric": number.metric,
            "mean": number.spread.mean,
            "std": number.spread.std,
            "network": number.network,
            "reference": number.reference,
            **protocol_line(report.protocol, report.reference, system, number),
        }
        for system in report.systems
        for number in system.numbers
    ]


def protocol_facts(report: Report) -> list[tuple[str, str]]:
    """The protocol as names and values for people."""
    facts = report.protocol
    drawn = f"{counted(facts['num_prompts'], 'prompt')} × {facts['num_images_per_prompt']}"
    made = [
        (f"features: {name}", f"{net['preprocess']}; weights {net['weights'][:16]}")
        for name, net in facts["networks"].items()
    ]
    made += [(f"score: {name}", text) for name, text in facts["scorers"].items()]
    made += [
        ("images", f"8 bits, {facts['frame']}; drawn ones as made for scores and looks"),
        ("counts", f"{drawn} {'videos' if facts['frames'] else 'images'}; "
            f"{counted(facts['num_reference'], 'reference image')}"),
        ("guidance", f"teacher {facts['guidance']}; students {facts['student_guidance']}"),
        ("reference", str(facts["reference"])),
        ("noise seeds", ", ".join(map(str, facts["seeds"]))),
        ("neighbours", f"k = {facts['nearest_k']}, first {facts['manifold_images']} images"),
        ("time", f"median over batches of {facts['batch_size']}, without the first; text to "
            f"pixels; {facts['device']}"),
        ("memory", facts["peak_memory_of"]),
        ("precision of networks", facts["dtype"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]  # fmt: skip
    return made + [(name, facts[name]) for name in ("frames", "preset") if facts[name]]


def _strip(report: Report, system: System) -> Strip:
    """A line for each video, or two of images."""
    per_line = system.frames if system.frames > 1 else -(-len(system.previews) // 2)
    starts = range(0, len(system.previews), max(per_line, 1))
    lines = [system.previews[first : first + per_line] for first in starts]
    value = report.quality(system)
    caption = "" if value is None else f"Fréchet {value_text(value, 'frechet')}"
    return Strip(system.group, report.name(system), caption, lines)


def _tables(report: Report) -> list[tuple[str, list[Table]]]:
    """One small table for each kind of number, each as wide as a page."""
    main, likeness = (
        f"Quality, against {REFERENCES[report.reference]}",
        "Likeness to the teacher's images",
    )
    kinds = {main: QUALITY, likeness: "", "Look": LOOK, "From frame to frame": OVER_TIME,
             "Cost": COST}  # fmt: skip
    by_table: dict[str, list[Key]] = {name: [] for name in kinds}
    for key in report.columns():
        kind = METRICS[key[0]].kind
        apart = kind == QUALITY and key[2] not in ("", report.reference)
        name = next(name for name, of in kinds.items() if of == ("" if apart else kind))
        by_table[name].append(key)
    made = []
    for name, keys in by_table.items():
        several = len({key[1] for key in keys if key[0] != "score" and key[1]}) > 1
        look = ["images"] if name == "Look" else []
        heads = ["", *look, *(heading(m, n if several or m == "score" else "") for m, n, _ in keys)]
        lines = [
            Line(
                system.group,
                [
                    report.name(system),
                    *(images_text(report.protocol, system.group, "saturation") for _ in look),
                    *(value_text(system.get(*key), key[0]) for key in keys),
                ],
            )
            for system in report.systems
            if any(system.get(*key) is not None for key in keys)
        ]
        if keys:
            made.append((name, [Table(heads, lines)]))
    return made


def _charts(report: Report) -> list[Chart]:
    """Frechet distance against steps, a curve for the teacher and one for each student's name;
    none where nothing was measured."""
    curves, labels = [], dict.fromkeys((s.group, s.label) for s in report.systems if s.steps)
    for index, (group, label) in enumerate(labels):
        same = [s for s in report.systems if (s.group, s.label) == (group, label)]
        points = [(s.steps or 0, report.quality(s)) for s in same]
        known = sorted((n, value.mean, value.std) for n, value in points if value is not None)
        if known:
            colour = COLOUR["teacher"] if group == "teacher" else CYCLE[index % len(CYCLE)]
            at, means, stds = zip(*known, strict=True)
            curves.append(Curve(label, at, means, stds, colour))
    ticks = sorted({system.steps for system in report.systems if system.steps})
    title = f"{report.networks[0]} Fréchet distance to {report.reference} (lower is better)"
    about = "Fréchet distance against steps"
    return [Chart(title, "steps", curves, ticks=ticks, about=about)] if curves else []
