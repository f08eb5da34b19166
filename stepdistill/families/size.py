"""A size of images far from the model's own: said, once, by every command that takes one."""

from __future__ import annotations

import warnings

from stepdistill.families.family import Family

FAR = 1.5  # a side of so many times the model's own is told


def size_fits(resolution: int | None, family: Family) -> None:
    """Warns of a resolution far from the model's own, with what it costs; whoever asks, from here,
    so that a command of several parts is told once."""
    size = family.image_size()
    if resolution is None or not size[0] or not size[1]:
        return
    area = resolution**2 / (size[0] * size[1])
    if not 1 / FAR**2 <= area <= FAR**2:
        warnings.warn(
            f"resolution: expected about the model's own {size[0]} x {size[1]} px, got "
            f"{resolution}: {area:.2g} times the pixels in every call, {area**2:.2g} times the "
            "work of attention, and a teacher that is not at its best there. Leave it out for the "
            "model's own.",
            stacklevel=1,
        )
