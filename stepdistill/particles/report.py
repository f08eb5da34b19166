"""What `stepdistill particles` shows: a grid or a turntable for each gradient, and its figures."""

# Shapes: N images, H, W in px.

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.reporting import page
from stepdistill.reporting.blocks import Block, Facts, Strip, Text
from stepdistill.reporting.pictures import ink
from stepdistill.reporting.table import Line, Table, write_csv
from stepdistill.storage.files import write_text

BEYOND = 0.05  # a value is saturated where it leaves [-1, 1] by more
SHOWN = 16  # particles in a grid
FILES = ("report.html", "report.png", "results.csv", "results.md")


@dataclass(frozen=True)
class Shown:
    """One system. group: real, teacher or student; lines: rows of images (1 or 3, H, W) in [-1, 1];
    figures: column -> text, in the order of the table."""

    group: str
    label: str
    lines: Sequence[Sequence[Tensor]]
    figures: Mapping[str, str] = field(default_factory=dict)


def saturation(images: Tensor) -> float:
    """Share of values of (N, C, H, W), before clamping, that leave [-1, 1] by more than BEYOND."""
    return float((images.abs() > 1 + BEYOND).double().mean())


def spread(images: Tensor, prompts: Sequence[Hashable]) -> float | None:
    """Mean standard deviation of a pixel among the images of a prompt; None where each has one."""
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    several = [index for index in groups.values() if len(index) > 1]
    if not several:
        return None
    values = [images[index].clamp(-1, 1).std(0).mean() for index in several]
    return float(torch.stack(values).mean())


def figures(images: Tensor, prompts: Sequence[Hashable]) -> dict[str, str]:
    """What can be said of any images without a judge."""
    among = spread(images, prompts)
    text = {"saturated": f"{100 * saturation(images):.1f} %"}
    return text if among is None else {**text, "spread": f"{among:.3f}"}


def grid(images: Tensor) -> list[list[Tensor]]:
    """The first images in two lines."""
    shown = [*images[:SHOWN].cpu()]
    half = -(-len(shown) // 2)
    return [line for line in (shown[:half], shown[half:]) if line]


def write_report(
    folder: Path,
    title: str,
    rows: Sequence[Shown],
    facts: Sequence[tuple[str, str]],
    note: str,
    about: str,
) -> Path:
    """report.html, report.png, results.csv and results.md in `folder`; the page's path.

    Args: note: how the figures were taken. about: what the pictures show.
    """
    names = [*dict.fromkeys(name for row in rows for name in row.figures)]
    lines = [
        Line(row.group, [row.label, *(row.figures.get(name, "–") for name in names)])
        for row in rows
    ]
    table = Table(["", *names], lines)
    strips: list[Block] = []
    for row in rows:
        pictures = [[ink(one) for one in line] for line in row.lines]
        caption = " · ".join(f"{name} {text}" for name, text in [*row.figures.items()][:2])
        strips.append(Strip(row.group, row.label, caption, pictures, about=about))
    sections: list[tuple[str, Sequence[Block]]] = [
        ("Pictures", strips),
        ("Figures", [table, Text(note)]),
        ("This run", [Facts(facts)]),
    ]
    page.Report(title, sections).write(folder / FILES[0], folder / FILES[1])
    write_csv(
        folder / FILES[2], [dict(zip(table.columns, one.cells, strict=True)) for one in lines]
    )
    write_text(folder / FILES[3], table.markdown() + "\n")
    return folder / FILES[0]
