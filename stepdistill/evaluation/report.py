"""The evaluation's files: report.json, report.csv (a line for each number, its protocol beside it),
report.png and report.html."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.reporting.values import Measured

from . import page
from .metrics import HIGHER_IS_BETTER, System
from .protocol import images_told, protocol_line

# metric -> (column heading, format, factor)
COLUMNS: dict[str, tuple[str, str, float]] = {
    "frechet": ("Fréchet", ".2f", 1),
    "kid": ("KID", ".3g", 1),
    "precision": ("precision", ".3f", 1),
    "recall": ("recall", ".3f", 1),
    "density": ("density", ".3f", 1),
    "coverage": ("coverage", ".3f", 1),
    "score": ("score", ".4f", 1),
    "diversity": ("diversity", ".3f", 1),
    "saturation": ("saturation", ".3f", 1),
    "contrast": ("contrast", ".3f", 1),
    "saturation_drift": ("saturation drift %", ".1f", 100),
    "contrast_drift": ("contrast drift %", ".1f", 100),
    "motion": ("motion", ".4f", 1),
    "motion_drift": ("motion drift %", ".1f", 100),
    "frame_distance": ("frame distance", ".3g", 1),
    "seconds_per_image": ("s / image", ".4f", 1),
    "seconds_per_video": ("s / video", ".3f", 1),
    "network_calls": ("network calls", ".1f", 1),
    "peak_memory_gib": ("peak GiB", ".2f", 1),
}

COSTS = ("seconds_per_image", "seconds_per_video", "network_calls", "peak_memory_gib")
LOOKS = ("saturation", "contrast", "saturation_drift", "contrast_drift")
OVER_TIME = ("motion", "motion_drift", "frame_distance")
DISTANCES = ("frechet", "kid", "precision", "recall", "density", "coverage", "diversity")
REFERENCES = {"real": "real images", "teacher": "the teacher's images"}


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
        return f"{system.label}, {system.steps} step{'s' if system.steps > 1 else ''}"

    def columns(self) -> list[tuple[str, str, str]]:
        """(metric, network, reference) of each number that any system has, in COLUMNS' order."""
        keys = {(n.metric, n.network, n.reference) for s in self.systems for n in s.numbers}
        order = {metric: index for index, metric in enumerate(COLUMNS)}
        return sorted(keys, key=lambda key: (order[key[0]], key[2] != self.reference, key))


def told(value: Measured | None, metric: str) -> str:
    """A value as the tables show it; a dash where there is none."""
    if value is None:
        return "–"
    _, form, factor = COLUMNS[metric]
    mean = value.mean * factor
    form = ".3g" if metric == "frechet" and abs(mean) < 1 else form
    text = f"{mean:{form}}"
    return f"{text} ± {value.std * factor:{form}}" if value.std else text


def heading(metric: str, network: str) -> str:
    """A column's heading, with an arrow towards the better."""
    name = network if metric == "score" else f"{network} {COLUMNS[metric][0]}".strip()
    better = HIGHER_IS_BETTER.get(metric)
    return name if better is None else f"{name} {'↑' if better else '↓'}"


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
    _write_csv(report, folder / "report.csv")
    _write_png(report, folder / "report.png")
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")


def _write_csv(report: Report, path: Path) -> None:
    rows = []
    for system in report.systems:
        for number in system.numbers:
            rows.append(
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
            )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def protocol_facts(report: Report) -> list[tuple[str, str]]:
    """The protocol as names and values for people."""
    facts = report.protocol
    made = [
        (f"features: {name}", f"{net['preprocess']}; weights {net['weights'][:16]}")
        for name, net in facts["networks"].items()
    ]
    made += [(f"score: {name}", text) for name, text in facts["scorers"].items()]
    made += [
        ("images", f"8 bits, {facts['frame']}; drawn ones as made for scores and looks"),
        (
            "counts",
            f"{facts['num_prompts']} prompts × {facts['num_images_per_prompt']} "
            f"{'videos' if facts['frames'] else 'images'}; "
            f"{facts['num_reference']} reference images",
        ),
        ("guidance", f"teacher {facts['guidance']}; students {facts['student_guidance']}"),
        ("reference", str(facts["reference"])),
        ("noise seeds", ", ".join(map(str, facts["seeds"]))),
        ("neighbours", f"k = {facts['nearest_k']}, first {facts['manifold_images']} images"),
        (
            "time",
            f"median over batches of {facts['batch_size']}, without the first; text to pixels; "
            f"{facts['device']}",
        ),
        ("memory", facts["peak_memory_of"]),
        ("precision of networks", facts["dtype"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    return made + [(name, facts[name]) for name in ("frames", "preset") if facts[name]]


def quality(report: Report, system: System) -> Measured | None:
    """The Frechet distance that the gallery and the plots show."""
    return system.get("frechet", report.networks[0], report.reference)


def _caption(report: Report, system: System) -> str:
    value = quality(report, system)
    return "" if value is None else f"Fréchet {told(value, 'frechet')}"


def render_html(report: Report) -> str:
    """The page: gallery, plot, table and protocol."""
    from .plots import contact, panel_png

    strips = []
    for system in report.systems:
        a_line = system.frames if system.frames > 1 else -(-len(system.previews) // 2)
        parts = [
            system.previews[first : first + a_line]
            for first in range(0, len(system.previews), max(a_line, 1))
        ]
        pictures = [contact(part) for part in parts]
        small = bool(pictures) and len(pictures[0]) < page.SMALL_PX
        caption = _caption(report, system)
        name = report.name(system)
        strips.append(page.Strip(system.group, name, caption, pictures, small=small))
    small_print = (
        f"Quality is measured against {report.protocol['reference']}. Same prompts and same noise "
        "for every row; mean ± deviation over noise seeds where there are several. Compare a "
        "Fréchet distance only with one of the same protocol."
    )
    sections = [("Samples", page.gallery(strips))]
    panel = _panel(report)
    if panel is not None:
        drawn = page.charts([("Fréchet distance against steps", panel_png(panel))])
        sections.append(("Quality against steps", drawn))
    sections += _tables(report)
    facts = page.facts(protocol_facts(report))
    sections.append(("Protocol of every figure", facts + page.paragraph(small_print)))
    return page.render(report.title, sections)


def _tables(report: Report) -> list[tuple[str, str]]:
    """One small table for each kind of number, each as wide as a page."""
    columns = report.columns()
    apart = COSTS + LOOKS + OVER_TIME
    quality = [k for k in columns if k[0] not in apart and k[2] in ("", report.reference)]
    rest = [key for key in columns if key not in quality]
    kinds = {
        f"Quality, against {REFERENCES[report.reference]}": quality,
        "Likeness to the teacher's images": [k for k in rest if k[0] not in apart],
        "Look": [key for key in rest if key[0] in LOOKS],
        "From frame to frame": [key for key in rest if key[0] in OVER_TIME],
        "Cost": [key for key in rest if key[0] in COSTS],
    }
    made = []
    for name, keys in kinds.items():
        several = len({key[1] for key in keys if key[0] in (*DISTANCES, *OVER_TIME[2:])}) > 1
        look = ["images"] if name == "Look" else []
        heads = ["", *look, *(heading(m, n if several or m == "score" else "") for m, n, _ in keys)]
        lines = [
            page.Line(
                system.group,
                [
                    report.name(system),
                    *(images_told(report.protocol, system.group, "saturation") for _ in look),
                    *(told(system.get(*key), key[0]) for key in keys),
                ],
            )
            for system in report.systems
            if any(system.get(*key) is not None for key in keys)
        ]
        if keys:
            made.append((name, page.table(heads, lines)))
    return made


def _panel(report: Report) -> Any:
    """Frechet distance against steps, a curve for the teacher and one for each student's name."""
    from .plots import COLOUR, CYCLE, Curve, draw_curves

    curves, labels = [], dict.fromkeys((s.group, s.label) for s in report.systems if s.steps)
    for index, (group, label) in enumerate(labels):
        own = [s for s in report.systems if (s.group, s.label) == (group, label)]
        points = [(s.steps or 0, quality(report, s)) for s in own]
        known = sorted((n, value.mean, value.std) for n, value in points if value is not None)
        if known:
            at, means, stds = zip(*known, strict=True)
            colour = COLOUR["teacher"] if group == "teacher" else CYCLE[index % len(CYCLE)]
            curves.append(Curve(label, at, means, stds, colour))
    if not curves:
        return None
    ticks = sorted({system.steps for system in report.systems if system.steps})
    title = f"{report.networks[0]} Fréchet distance to {report.reference} (lower is better)"
    return lambda axes: draw_curves(axes, curves, title, "steps", ticks=ticks)


def _write_png(report: Report, path: Path) -> None:
    from .plots import COLOUR, Strip, contact, save_page

    strips = [
        Strip(
            report.name(system),
            _caption(report, system),
            contact(system.previews),
            len(system.previews),
            COLOUR[system.group],
            bold=system.group == "student",
            breaks=range(system.frames, len(system.previews), system.frames)
            if system.frames > 1
            else (),
        )
        for system in report.systems
        if system.previews
    ]
    panel = _panel(report)
    save_page(path, report.title, strips, [] if panel is None else [panel])
