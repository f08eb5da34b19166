"""Numbers that no option can have are refused wherever options are read."""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ValidationError

from stepdistill.config.run import TrainConfig
from stepdistill.config.tuning import Tuning
from stepdistill.core.options import DIFFERENT, Options
from stepdistill.evaluation.options import Options as EvaluateOptions
from stepdistill.methods import METHODS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "1e999"])
@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (TrainConfig, "learning_rate"),
        (TrainConfig, "max_grad_norm"),
        (TrainConfig, "validation_guidance"),
        (TrainConfig, "max_train_seconds"),
        (Tuning, "alpha"),
        *((cls.Config, name) for cls in METHODS.values() for name in cls.guidance_options[-1:]),
    ],
)
def test_nothing_is_nan_or_without_end(cls: type[BaseModel], option: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        cls(**{option: value})


@pytest.mark.parametrize("value", [-1e-6, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("option", ["role_learning_rates", "role_max_grad_norm"])
def test_values_by_role_are_checked_like_the_one_for_all(option: str, value: float) -> None:
    """A negative clipping norm would turn descent into ascent."""
    with pytest.raises(ValidationError):
        TrainConfig(**{option: {"fake": value}})


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_seeds_are_what_generators_take(seed: int) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(seed=seed)
    with pytest.raises(ValidationError):
        EvaluateOptions(teacher="a", student=("b",), seeds=(0, seed))
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize(
    "command", ["compare", "demo", "export", "pairs", "sample", "train", "plan"]
)
def test_every_commands_options_are_of_one_kind(command: str) -> None:
    module = import_module(f"stepdistill.cli.{command}")
    made = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, BaseModel)]
    assert made
    assert all(issubclass(cls, Options) for cls in made)


def test_what_is_asked_twice_is_refused() -> None:
    class Asked(Options):
        steps: Annotated[tuple[int, ...], DIFFERENT] = ()

    assert Asked(steps=(4, 1)).steps == (4, 1)
    with pytest.raises(ValidationError, match=r"steps: expected different ones, got \[4, 1, 4\]"):
        Asked(steps=(4, 1, 4))
