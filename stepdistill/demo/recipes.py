"""The settings each method trains the digits' students with, as files for `stepdistill train`.

Found by trial on the demo's teacher; they are recipes for 183k parameters, not for SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepdistill.training.configfile import merge


@dataclass(frozen=True)
class Recipe:
    """One method's training settings; `by_steps` is laid over `common` for a student's steps.

    data: "prompts", "images" or "pairs". warm_steps: step counts whose student first learns the
    teacher's pairs by regression, as DMD2's one-step SDXL does (arXiv:2405.14867, Sec. 5.2).
    """

    method: str
    common: Mapping[str, Any]
    by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    data: str = "prompts"
    warm_steps: tuple[int, ...] = ()

    @property
    def needs_pairs(self) -> bool:
        return self.data == "pairs" or bool(self.warm_steps)

    def settings(self, num_steps: int) -> dict[str, Any]:
        """The config file's content for a student of that many steps."""
        return merge({"method": self.method, **self.common}, self.by_steps.get(num_steps, {}))

    def describe(self) -> str:
        """Batch and rates in a few words."""
        rates = {"student": self.common["learning_rate"], **self.common["role_learning_rates"]}
        told = ", ".join(f"{role} {rate:g}" for role, rate in rates.items())
        return f"batch {self.common['train_batch_size']}, learning rates {told}"


COMMON: dict[str, Any] = {
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "role_learning_rates": {},
    "lr_scheduler": "cosine",
    "adam_beta1": 0.0,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 100.0,
    "ema_decay": 0.98,
    "checkpointing_steps": 0,
    "logging_steps": 5,
    "tuning": {"student": "full", "fake": "full"},
}
REGRESSION = merge(
    COMMON,
    {
        "learning_rate": 2e-3,
        "adam_beta1": 0.9,
        "max_train_steps": 300,
        "method_config": {"stage": "distill"},
    },
)
# An adapter of 183k parameters' projections and convolutions wants twice the rate of full tuning.
LORA: dict[str, Any] = {
    "tuning": {"student": "lora", "fake": "lora", "rank": 16, "alpha": 16},
}

RECIPES: dict[str, Recipe] = {
    "dmd2": Recipe(
        "dmd2",
        merge(COMMON, {"role_learning_rates": {"fake": 2e-3}, "max_train_steps": 600}),
        {
            1: {"method_config": {"num_steps": 1, "guidance": 1.0, "critic_steps": 2}},
            # The gradient reaches the last step alone: matching each step's own x0 trains the
            # fake on a mixture whose blurry first steps push the last one too far.
            4: {
                "max_train_steps": 400,
                "method_config": {
                    "num_steps": 4,
                    "sampler": "ode",
                    "trained_step": "last",
                    "guidance": 1.0,
                    "critic_steps": 2,
                },
            },
        },
        warm_steps=(1,),
    ),
    "consistency": Recipe(
        "consistency",
        merge(
            COMMON,
            {
                "max_train_steps": 1200,
                "adam_beta1": 0.9,
                "method_config": {"guidance_range": [1.0, 1.0], "target": "ema"},
            },
        ),
        data="images",
    ),
    "reflow": Recipe(
        "reflow",
        merge(REGRESSION, {"max_train_steps": 2000}),
        {1: {"method_config": {"num_steps": 1}}, 4: {"method_config": {"num_steps": 4}}},
        data="pairs",
    ),
}


def recipe_for(method: str, student: str) -> Recipe:
    """The recipe of a method for a full or LoRA student. Errors: ValueError naming the methods."""
    if method not in RECIPES:
        raise ValueError(f"demo: expected a method of {sorted(RECIPES)}, got {method!r}.")
    recipe = RECIPES[method]
    if student == "full":
        return recipe
    return Recipe(method, as_lora(recipe.common), recipe.by_steps, recipe.data, recipe.warm_steps)


def as_lora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with adapters in place of copies, at twice the learning rates."""
    rates = {role: 2 * rate for role, rate in settings["role_learning_rates"].items()}
    doubled = {"learning_rate": 2 * settings["learning_rate"], "role_learning_rates": rates}
    return merge(settings, {**LORA, **doubled})
