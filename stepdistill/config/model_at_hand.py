"""What a run's files and flags may know of the teacher in a folder here, before it is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.config.layers import Layer, layers_of, recipe_files

if TYPE_CHECKING:
    from stepdistill.loading.source import ModelSource

SMALL = 50_000_000  # parameters of a denoiser; papers' rates are for twenty times as many and more


def is_here(model: str) -> bool:
    """Whether it is a pipeline's folder or a single file on this machine."""
    return (Path(model) / "model_index.json").is_file() or Path(model).is_file()


def is_known(source: ModelSource, ask: bool) -> bool:
    """Whether its index can be read: it is here or, where the Hub may be asked, there."""
    if is_here(source.model) or not ask:
        return is_here(source.model)
    from stepdistill.loading.identity import is_hub_id

    try:
        return is_hub_id(source.model) and bool(source.index)
    except (OSError, ValueError):
        return False  # the loader says what is wrong with it


@dataclass(frozen=True)
class ModelAtHand:
    """family: the name of the family that serves it, "" where none of its own does. size: its
    denoiser's parameters, 0 where its files don't say."""

    family: str = ""
    size: int = 0

    @classmethod
    def of(cls, source: ModelSource) -> ModelAtHand:
        """From its index, and from the headers of its weight files. Errors: see
        `ModelSource.index`."""
        from safetensors import SafetensorError, safe_open

        from stepdistill.families.registry import FAMILIES  # Diffusers: mistakes need none

        served = (f for f in FAMILIES.values() if source.pipeline_class in f.pipelines)
        family = next(served, None)
        if family is None:
            return cls()
        if source.is_single_file:
            return cls(family.name)
        size = 0
        try:
            for file in (Path(source.described_at) / family.net_name).glob("*.safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                        size += math.prod(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError):
            return cls(family.name)  # the loader says what is wrong with them
        return cls(family.name, size)

    def recipe_by_size(self, method: str) -> tuple[list[Layer], list[str]]:
        """(layers, the line about them) of the method's recipe for small models; none of others."""
        if not 0 < self.size < SMALL:
            return [], []
        for name, layers in recipe_files().items():
            about, values = layers[-1].recipe, layers[-1].values
            if about is not None and about.size == "small" and values.get("method") == method:
                return layers_of(name), [
                    f"recipe {name}, as the denoiser has {self.size / 1e6:.2g} M parameters: rates "
                    "of papers, for a thousand times as many, would move nothing (--recipe or "
                    "--config NAME for another)"
                ]
        return [], []

    def check_recipe(self, layers: Sequence[Layer]) -> None:
        """Warns, once, of a recipe or a model file of ours for another family."""
        for layer in layers:
            family = layer.recipe.family if layer.recipe else ""
            if layer.model.guidance:
                family = layer.model.family or layer.name
            if family and self.family and family != self.family:
                warnings.warn(
                    f"{layer.name} is for models of family {family}, the teacher is of "
                    f"{self.family}: its guidance and rates may not suit. `stepdistill recipes` "
                    "lists recipes by model.",
                    stacklevel=3,
                )
                return
