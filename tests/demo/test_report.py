"""The report shows every row, states each verdict, and stands alone."""

import re

import pytest
import torch
from PIL import Image
from rich.console import Console

from stepdistill.demo.metrics import Row
from stepdistill.demo.report import Report, print_report, write_report
from stepdistill.demo.verdict import quality_checks, time_check
from stepdistill.reporting.pictures import contact, ink
from stepdistill.reporting.values import Measured


def row(group: str, steps: int | None, frechet: float, recall: float = 0.85) -> Row:
    generator = torch.Generator().manual_seed(steps or 0)
    return Row(
        label=group if steps is None else f"{group} <{steps}>",
        group=group,
        steps=steps,
        frechet=Measured(frechet, 0.1),
        frechet_pixels=Measured(frechet / 4, 0.01),
        recall=Measured(recall, 0.01),
        accuracy=Measured(0.97, 0.01),
        network_calls=None if steps is None else float(steps),
        seconds_per_image=None if steps is None else 0.001 * steps,
        previews=torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1,
    )


def rows(one: float = 2.2, four: float = 2.1, recall: float = 0.85) -> list[Row]:
    teacher = [(1, 40.0), (2, 8.5), (4, 3.5), (8, 2.4), (50, 2.0)]
    return [
        row("real", None, 1.3),
        *(row("teacher", steps, value) for steps, value in teacher),
        row("student", 1, one, recall),
        row("student", 4, four),
    ]


@pytest.mark.parametrize(
    ("one", "four", "recall", "expected"),
    [
        (2.2, 2.1, 0.85, [True, True, True, True]),
        (2.4, 2.6, 0.80, [True, True, True, True]),
        (2.41, 2.1, 0.85, [False, True, True, False]),
        (2.2, 2.1, 0.79, [True, False, True, True]),
        (2.2, 2.61, 0.85, [True, True, False, True]),
    ],
)
def test_bar(one: float, four: float, recall: float, expected: list[bool]) -> None:
    assert [check.passed for check in quality_checks(rows(one, four, recall))] == expected


def test_a_missed_aim_is_no_failure() -> None:
    missed = [check for check in quality_checks(rows(one=2.41, recall=0.1)) if not check.passed]
    assert {(check.kind, check.word) for check in missed} == {("open", "not reached")}


def test_checks_need_their_rows() -> None:
    assert len(quality_checks([r for r in rows() if r.steps != 4 or r.group != "student"])) == 3


def test_time_limit_depends_on_the_cache() -> None:
    assert time_check(200, 360, teacher_cached=False).passed
    assert not time_check(200, 180, teacher_cached=True).passed


@pytest.fixture
def report() -> Report:
    return Report(
        title="Digits & <steps>",
        rows=rows(),
        checks=quality_checks(rows(recall=0.7)),
        snippet='pipeline("a <b>")',
        facts=[("Method", "dmd2")],
        num_images=539,
        num_seeds=3,
    )


def test_html_is_complete_escaped_and_self_contained(report: Report, tmp_path) -> None:
    html, _ = write_report(report, tmp_path)
    text = html.read_text(encoding="utf-8")
    assert "Digits &amp; &lt;steps&gt;" in text
    assert "pipeline(&quot;a &lt;b&gt;&quot;)" in text
    assert text.count("<figure") == len(report.rows)
    assert text.count('src="data:image/png;base64,') == 2 * len(report.rows)
    assert text.count("<tr class=") == len(report.rows)
    assert "40.00 ± 0.10" in text
    assert "not reached" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text
    assert '<meta name="viewport"' in text


@pytest.mark.full
def test_png_is_a_readable_page(report: Report, tmp_path) -> None:
    _, png = write_report(report, tmp_path)
    with Image.open(png) as image:
        assert image.width > 1200
        assert image.height > 900
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_terminal_table_fits_80_columns(report: Report) -> None:
    console = Console(width=80, record=True, force_terminal=False)
    print_report(report, console)
    text = console.export_text()
    table = [line for line in text.splitlines() if line.startswith(" teacher")]
    assert len(table) == 5
    assert "40.00±0.10" in table[0]
    assert "…" not in text
    assert 'pipeline("a <b>")' in text


def test_strip_places_each_image_with_dark_ink() -> None:
    images = torch.full((4, 1, 8, 8), -1.0)
    images[2] = 1.0  # ink
    picture = contact([ink(image) for image in images], columns=2)
    assert picture.shape == (17, 17)
    assert (picture[9:, :8] == 0).all()
    assert (picture[:8, :8] == 255).all()
    assert (picture[9:, 9:] == 255).all()
