"""Labels of a report's rows have room in its picture."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stepdistill.reporting.blocks import Strip
from stepdistill.reporting.plots import LABEL_IN, WIDTH_IN, draw_strip

LABELS = (
    "student, 4 steps",
    "teacher, guidance 7.5",
    "wmwm distillation, mmw",
    "sds, guidance 7.5: a handwritten zero, seen from twelve sides",
    "one " * 80,
)


@pytest.mark.parametrize("label", LABELS, ids=range(len(LABELS)))
def test_a_label_stays_in_its_margin(label: str) -> None:
    figure = Figure(figsize=(WIDTH_IN, 2.0), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((LABEL_IN / WIDTH_IN, 0.1, 0.5, 0.8))
    lines = [[np.zeros((8, 8), np.uint8)] * 12]
    draw_strip(axes, Strip("student", label, "a caption", lines, about="digits"))
    canvas.draw()
    box = axes.texts[0].get_window_extent()
    assert box.x0 >= -35, label  # the page's own margin is 0.35 in
    assert box.height < 45
