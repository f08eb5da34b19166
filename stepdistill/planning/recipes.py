"""Costs of the recipes at their models' real size, as `plan` forecasts them.

The forecasts stand in index.json, so that a table of them needs neither torch nor minutes, and
`plan` of a recipe as it stands no trace; written by `stepdistill recipes --refresh` alone, and
held against the recipes by tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from stepdistill.config.layers import About, Layer, merged, recipe_files, several_trainings
from stepdistill.planning.costs import Forecast
from stepdistill.storage.files import json_sha256, read_json, write_text

CARDS = (12, 16, 24, 48, 80)  # GB
TIGHT = 0.9  # the share of a memory above which fragments and other programs may be too much
INDEX = Path(str(resources.files("stepdistill.planning"))) / "index.json"


def verdict(peak: float, memory: float) -> str:
    """fits, tight or no: of that many bytes in that memory."""
    return "no" if peak > memory else "tight" if peak > TIGHT * memory else "fits"


def run_of(layers: Sequence[Layer]) -> Any:
    """The RunConfig of a recipe at its model's real size."""
    from stepdistill.config.files import parse_run_config

    about = layers[-1].recipe
    assert about is not None
    argv = ["--recipe", layers[-1].name, "--pretrained_model_name_or_path", about.model]
    return parse_run_config(argv)


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


def settings_hash(layers: Sequence[Layer]) -> str:
    """Of all that a recipe's files and its model's description say; a forecast is of those."""
    about = layers[-1].recipe
    assert about is not None
    model = INDEX.parent / "models" / f"{about.model}.json"
    said = [merged(layers), json.loads(model.read_text(encoding="utf-8"))]
    return json_sha256(said)[:16]


def forecast_of(layers: Sequence[Layer]) -> dict[str, Any]:
    """The recipe's entry in the index. peak: bytes of one process, of the forecast."""
    from stepdistill.planning.forecast import forecast

    plan = forecast(run_of(layers))
    return {"settings": settings_hash(layers), "peak": plan.peak, "forecast": asdict(plan)}


def known_forecast(layers: Sequence[Layer]) -> Forecast | None:
    """The index's forecast of a recipe; None where it has none of the recipe as it stands."""
    entry = known().get(layers[-1].name, {})
    if "forecast" not in entry or entry["settings"] != settings_hash(layers):
        return None
    return Forecast.of(entry["forecast"])


def known() -> dict[str, dict[str, Any]]:
    """The index: recipe -> its entry."""
    return read_json(INDEX) if INDEX.is_file() else {}


def listed() -> dict[str, tuple[About, list[str], int | None]]:
    """(block, methods, the largest peak where all are known) of every recipe; one of several
    trainings is one."""
    files, sizes, several = recipe_files(), known(), several_trainings()
    rows: dict[str, tuple[About, list[str], int | None]] = {}
    for recipe in dict.fromkeys(name.partition("/")[0] for name in files):
        parts = several[recipe].trainings if recipe in several else {}
        names = [f"{recipe}/{part}" for part in parts] or [recipe]
        about = several.get(recipe) or files[recipe][-1].recipe
        assert about is not None, "recipe_files reads recipes alone"
        peaks = [sizes[name]["peak"] for name in names if name in sizes]
        methods = [*dict.fromkeys(method_of(files[name]) for name in names)]
        rows[recipe] = about, methods, max(peaks) if len(peaks) == len(names) else None
    return rows


def refresh(names: Iterable[str]) -> None:
    """Forecast these recipes anew and write the index after each; others' entries stay."""
    recipes = sized()
    for name in names:
        entries = {**known(), name: forecast_of(recipes[name])}
        made = {n: json.dumps(entries[n]) for n in sorted(entries) if n in recipes}
        lines = ",\n".join(f"{json.dumps(n)}: {entry}" for n, entry in made.items())
        write_text(INDEX, f"{{\n{lines}\n}}\n")
