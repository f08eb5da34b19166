"""Memory of the recipes at their models' real size, as `plan` forecasts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.config.layers import Layer, merge, merged, recipe_files

CARDS = (12, 16, 24, 48, 80)  # GB


def cards(gib: float) -> list[int]:
    """The cards, in GB, that hold so much."""
    return [card for card in CARDS if gib * 2**30 <= card * 1e9]


def run_of(layers: Sequence[Layer]) -> Any:
    """The RunConfig of a recipe at its model's real size, without its image scorers."""
    from stepdistill.config.files import parse_run_config

    about = layers[-1].recipe
    assert about is not None
    argv = ["--recipe", layers[-1].name, "--pretrained_model_name_or_path", about.model]
    run: Any = parse_run_config(argv)
    changes: Mapping[str, Any] = about.without
    return run.model_validate(merge(run.model_dump(), changes))


def forecast_gib(layers: Sequence[Layer]) -> float:
    """GiB of one process, as `plan` forecasts it."""
    from stepdistill.planning.forecast import forecast

    return round(forecast(run_of(layers)).peak / 2**30, 1)


def sized() -> dict[str, list[Layer]]:
    """The recipes that are made for a model, not for a size."""
    return {
        name: layers
        for name, layers in recipe_files().items()
        if layers[-1].recipe is not None and layers[-1].recipe.model != "any"
    }


def method_of(layers: Sequence[Layer]) -> str:
    """The method's name that a recipe's files come to."""
    return str(merged(layers)["method"])
