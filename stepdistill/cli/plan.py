"""Forecast a run's memory and hours from configurations alone; status 1 where it won't fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from pydantic import Field, PrivateAttr, ValidationError

from stepdistill.config.files import parse_run_config
from stepdistill.config.flags import explain, taken
from stepdistill.config.layers import merged, recipe_layers
from stepdistill.config.places import Place
from stepdistill.config.planned import bundled, require_known
from stepdistill.config.run import RunConfig
from stepdistill.planning.costs import Forecast
from stepdistill.planning.recipes import known_forecast


class Options(RunConfig):
    first = (*RunConfig.first, "num_gpus", "gpu", "memory_gb")

    pretrained_model_name_or_path: Annotated[str, Place(require_known)]
    """Teacher pipeline: a folder, of which weights may be absent, or a model's name; of a recipe
    alone, the model that it is made for."""
    num_gpus: int = Field(default=1, ge=1)
    """Processes that share the run, one a GPU."""
    gpu: str = "rtx4090"
    """Which one: its memory and its peak rate."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one GPU in GB; none means all of `gpu`'s."""
    _stored: Forecast | None = PrivateAttr(None)
    _complete: Callable[[], RunConfig] | None = PrivateAttr(None)


def parse(argv: Sequence[str], prog: str) -> Options:
    """A run's options and the machine's; of a recipe alone whose forecast is stored, without the
    method's, which take torch."""
    recipe, rest = taken(argv, "recipe")
    layers = recipe_layers(recipe) if recipe else []
    about = layers[-1].recipe if layers else None
    if about is None or about.model not in bundled():
        return _complete(argv, prog)
    model, rest = taken(rest, "pretrained_model_name_or_path")
    if model is None:
        argv = ["--pretrained_model_name_or_path", about.model, *argv]
    if model not in (None, about.model) or (plan := known_forecast(layers)) is None:
        return _complete(argv, prog)
    machine: dict[str, str] = {}
    for name in ("num_gpus", "gpu", "memory_gb"):
        value, rest = taken(rest, name)
        machine |= {name: value} if value is not None else {}
    if rest:
        return _complete(argv, prog)
    values = {**merged(layers), "recipe": recipe, "pretrained_model_name_or_path": about.model}
    try:
        options = Options(**{**values, **machine})
    except ValidationError as err:
        raise explain(err, Options, "plan") from err
    options._stored, options._complete = plan, partial(_complete, argv, prog)
    return options


def _complete(argv: Sequence[str], prog: str) -> Options:
    return parse_run_config(argv, prog, about=str(__doc__), model=Options, early=True)


def run(options: Options) -> int:
    from stepdistill.planning.report import print_plan

    machine = (options.num_gpus, options.gpu, options.memory_gb)
    fits = print_plan(options, *machine, options._stored, options._complete)
    return 0 if fits else 1
