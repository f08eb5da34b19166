"""A method's settings in a comparison on a user's teacher: as `stepdistill train` settles them,
under what is the same for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.config.layers import Layer, layers_of, merge, merged
from stepdistill.config.method_names import resolve_method
from stepdistill.config.model_at_hand import ModelAtHand
from stepdistill.config.run import RunConfig, TrainConfig
from stepdistill.config.suited import Why, settled, suited
from stepdistill.loading.source import ModelSource
from stepdistill.methods import METHODS

from .user_options import UserOptions, bundled, is_method

# What a comparison decides itself, whatever a file says.
OURS: Mapping[str, Any] = {
    "checkpointing_steps": 0, "resume_from_checkpoint": None, "validation_steps": 0,
    "validation_prompts": [], "best_metric": None, "max_train_seconds": None, "report_to": [],
    "push_to_hub": False, "hub_model_id": None,
}  # fmt: skip
# A run's model, data and outputs: a file for `stepdistill train` has them, a comparison its own.
ELSEWHERE = set(RunConfig.model_fields) - set(TrainConfig.model_fields)
ELSEWHERE = (ELSEWHERE | {"output_dir", "seed"}) - {"method", "method_config"}


@dataclass(frozen=True)
class Settings:
    """A method's settings, as `settled` reads a run's."""

    values: dict[str, Any]

    @property
    def method(self) -> str:
        name: str = self.values["method"]
        return name

    @property
    def method_config(self) -> dict[str, Any]:
        options: dict[str, Any] = self.values["method_config"]
        return options


def settle(user: UserOptions, name: str, given: str | None) -> tuple[dict[str, Any], list[str]]:
    """(settings, lines about what they were chosen by). Args: given: the user's file."""
    file = given or bundled(name)  # none of a method that others add: its own defaults
    layers = [] if file is None else layers_of(file)
    by_name = given is None and is_method(name)  # else it is a file's name, which is meant
    named = name if by_name else merged(layers).get("method", name)

    def read(layers: Sequence[Layer], at_hand: ModelAtHand) -> tuple[Settings, Why]:
        return _read(user, str(user.settings.get("method", named)), layers, at_hand)

    chosen = [] if by_name else layers
    run, _ = read(chosen, ModelAtHand())
    at_hand = ModelAtHand.known(ModelSource.of(user.teacher), ask=True) or ModelAtHand()
    run, lines = settled(
        read,
        run,
        chosen,
        at_hand,
        by_size=True,
        otherwise=layers,
        called=named,
        flags=f"--methods {name}=FILE",
    )
    return run.values, lines


def _read(
    user: UserOptions, method: str, layers: Sequence[Layer], at_hand: ModelAtHand
) -> tuple[Settings, Why]:
    """These files' settings between what a comparison starts from and what is the same for all,
    and what the model at hand has settled."""
    layers = [*layers, Layer("settings", user.settings)]
    values = {key: value for key, value in merged(layers).items() if key not in ELSEWHERE}
    called, options = resolve_method(method, values.get("method_config"))
    cls = METHODS[called]
    options, why = suited(cls, layers, options, at_hand)
    same: dict[str, Any] = {**OURS}
    if user.mixed_precision or not torch.cuda.is_available():
        same["mixed_precision"] = user.mixed_precision or "no"
    if user.train_batch_size:
        same["train_batch_size"] = user.train_batch_size
    if user.resolution:
        same["resolution"] = user.resolution
    if user.student:
        same["tuning"] = {"student": user.student, "fake": user.student}
    if user.guidance is not None:
        same["method_config"] = cls.options_at(user.guidance)
    values |= {"method": called, "method_config": options}
    return Settings(merge({"mixed_precision": "bf16", **values}, same)), why
