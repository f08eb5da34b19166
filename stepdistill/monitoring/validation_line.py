"""What the terminal says of validations that nobody asked for (own_validation), without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.reporting.values import counted


def line_of(said: Mapping[str, Any]) -> str:
    """What the terminal says of a decision."""
    if not said["steps"]:
        return f"validation: none: {said['why']}"
    every = "update" if said["steps"] == 1 else counted(said["steps"], "update")
    prompts, images = counted(len(said["prompts"]), "prompt"), counted(said["images"], "image")
    return (
        f"validation: every {every} on {prompts} of {images} (about {said['share']:.1%} of the "
        "cost; --validation_steps 0: none)"
    )
