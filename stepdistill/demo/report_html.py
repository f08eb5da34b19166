"""report.html: one self-contained page that reads well on a wide screen and on a phone."""

from __future__ import annotations

from stepdistill.evaluation import page

from .metrics import PREVIEWS_PER_CLASS, Row
from .report import COLUMNS, Report, cells
from .report_images import strip

NOTE = (
    "Each row from the same noise and the same prompts, “a handwritten zero” to “a handwritten "
    "nine”. The first row is real: training images."
)


def render_html(report: Report) -> str:
    """The page's text; all pictures are data: addresses, nothing is fetched when it is opened."""
    checks = [
        ("good" if one.passed else "open" if one.aim else "bad", one.word, one.claim, one.measured)
        for one in report.checks
    ]
    lines = [page.Line(row.group, cells(row)) for row in report.rows]
    strips = page.gallery([_strip(row) for row in report.rows])
    return page.render(
        report.title,
        [
            ("The bar", page.verdicts(checks)),
            ("Samples", strips + page.paragraph(NOTE)),
            ("Figures", page.table(COLUMNS, lines) + page.paragraph(report.caption)),
            ("Use it", page.code(report.snippet)),
            ("This run", page.facts(report.facts)),
        ],
    )


def _strip(row: Row) -> page.Strip:
    """One picture for each preview of a class: side by side where there is room, else stacked."""
    parts = [row.previews[i::PREVIEWS_PER_CLASS] for i in range(PREVIEWS_PER_CLASS)]
    return page.Strip(
        row.group,
        row.label,
        f"Fréchet {row.frechet.mean:.2f} · recall {row.recall.mean:.2f}",
        [strip(part, columns=len(part)) for part in parts],
        about="digits zero to nine",
        small=True,
    )
