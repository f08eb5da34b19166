"""Strips of 8x8 digits for the reports, dark ink on white."""

# N images, H height, W width

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def strip(images: Tensor, columns: int, gap_px: int = 1) -> NDArray[np.uint8]:
    """(H, W) picture of (N, 1, 8, 8) images in [-1, 1], row by row; ink dark, paper white."""
    ink = ((images.clamp(-1, 1) + 1) / 2)[:, 0].numpy()
    count, height, width = ink.shape
    rows = -(-count // columns)
    cell_h, cell_w = height + gap_px, width + gap_px
    canvas = np.zeros((rows * cell_h - gap_px, columns * cell_w - gap_px), dtype=np.float32)
    for index, image in enumerate(ink):
        top, left = index // columns * cell_h, index % columns * cell_w
        canvas[top : top + height, left : left + width] = image
    return (255 * (1 - canvas)).round().astype(np.uint8)
