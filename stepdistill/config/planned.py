"""The models that `plan` knows without any file (planning/models), looked up without torch."""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from stepdistill.config.layers import merge


def _folder() -> Traversable:
    return resources.files("stepdistill.planning") / "models"


def bundled() -> list[str]:
    """Names of the models that `plan` knows without any file."""
    files = (f.name for f in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in files if name.endswith("json"))


def description(name: str) -> dict[str, Any]:
    """One of them: {"pipeline": class name, "options": {...}, "parts": {name: {"class", "config"}}}
    (a part that is left out is None). A file names another in "like" for what it shares with it."""
    made: dict[str, Any] = json.loads((_folder() / f"{name}.json").read_text())
    if "like" in made:
        base = description(made.pop("like"))
        made = {**base, **made, "parts": merge(base["parts"], made.get("parts", {}))}
    return made


def require_known(option: str, model: str) -> None:
    """Errors: ValueError for what is neither one of them nor a pipeline folder."""
    if model not in bundled() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(
            f"{option}: expected a pipeline folder (with model_index.json) or one of {bundled()}, "
            f"got {model!r}."
        )
