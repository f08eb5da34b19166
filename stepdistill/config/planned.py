"""The models that `plan` knows without any file (planning/models), looked up without torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled() -> list[str]:
    """Names of the models that `plan` knows without any file."""
    folder = resources.files("stepdistill.planning") / "models"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith("json"))


def require_known(option: str, model: str) -> None:
    """Errors: ValueError for what is neither one of them nor a pipeline folder."""
    if model not in bundled() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(
            f"{option}: expected a pipeline folder (with model_index.json) or one of {bundled()}, "
            f"got {model!r}."
        )
