"""What a run's files and flags may know of the teacher before it is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.config.layers import Layer, recipe_files
from stepdistill.config.planned import bundled, description
from stepdistill.core.abilities import Abilities
from stepdistill.core.registry import plain_name

if TYPE_CHECKING:
    from stepdistill.families.family import Family
    from stepdistill.loading.source import ModelSource

SMALL = 50_000_000  # parameters of a denoiser; papers' rates are for twenty times as many and more


def is_here(model: str) -> bool:
    """Whether it is a pipeline's folder or a single file on this machine."""
    return (Path(model) / "model_index.json").is_file() or Path(model).is_file()


@dataclass(frozen=True)
class ModelAtHand:
    """family: the name of the family that serves it, or whose settings suit it (settings_of), ""
    where none of its own does. size: its denoiser's parameters, 0 where its files don't say.
    abilities: what its configurations say that it can be asked for."""

    family: str = ""
    size: int = 0
    abilities: Abilities = field(default_factory=Abilities)

    @classmethod
    def known(cls, source: ModelSource, ask: bool) -> ModelAtHand | None:
        """Of a model that is here, that `plan` knows or, where the Hub may be asked, there; None of
        others, and of those whose index can't be read: the loader says what is wrong."""
        if is_here(source.model):
            return cls.of(source)
        if source.model in bundled():
            return cls.planned(source.model)
        from stepdistill.loading.identity import is_hub_id

        try:
            there = ask and is_hub_id(source.model) and bool(source.index)
        except (OSError, ValueError):
            there = False
        return cls.of(source) if there else None

    @classmethod
    def planned(cls, name: str) -> ModelAtHand:
        """Of a model that `plan` knows without its files."""
        model = description(name)
        family = _family(model["pipeline"])
        if family is None:
            return cls()
        embeds = family.told_guidance_in(model["parts"][family.net_name]["config"])
        has_null = family.null_in(model["options"])
        abilities = Abilities(told_guidance=embeds, has_null=has_null)
        return cls(family.settings_of or family.name, 0, abilities)

    @classmethod
    def of(cls, source: ModelSource) -> ModelAtHand:
        """From its index, its configurations, and the headers of its weight files. Errors: see
        `ModelSource.index`."""
        family = _family(source.pipeline_class)
        if family is None:
            return cls()
        made, size = cls(family.settings_of or family.name, 0, _abilities(source)), 0
        if source.is_single_file:
            return made
        from safetensors import SafetensorError, safe_open

        try:
            for file in (Path(source.described_at) / family.net_name).glob("*.safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                        size += math.prod(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError):
            return made  # the loader says what is wrong with them
        return replace(made, size=size)

    def recipe_by_size(self, method: str, called: str, flags: str) -> tuple[list[Layer], list[str]]:
        """(layers, the line about them) of the method's recipe for small models; none of others.

        Args: called: the user's name of it, which may have a recipe of its own. flags: what a user
            sets another by.
        """
        if not 0 < self.size < SMALL:
            return [], []
        made = {
            about.called: (name, layers)
            for name, layers in recipe_files().items()
            if (about := layers[-1].recipe) is not None
            and about.size == "small"
            and layers[-1].values.get("method") == method
        }
        if not made:
            return [], []
        name, layers = made.get(plain_name(called)) or made[""]
        return layers, [
            f"recipe {name}, as the denoiser has {self.size / 1e6:.2g} M parameters: rates "
            f"of papers, for a thousand times as many, would move nothing ({flags} for "
            "another)"
        ]

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


def _family(pipeline_class: str) -> type[Family] | None:
    """The family of its own that serves it."""
    from stepdistill.families.registry import FAMILIES  # Diffusers: mistakes need none

    return next((f for f in FAMILIES.values() if pipeline_class in f.pipelines), None)


def _abilities(source: ModelSource) -> Abilities:
    from stepdistill.families.registry import teacher_facts

    try:
        facts = teacher_facts(source)
    except (OSError, ValueError):
        return Abilities()  # the loader says what is wrong with its configurations
    setting = facts.setting
    return Abilities(setting.path, facts.told_guidance, facts.has_null, setting.kind)
