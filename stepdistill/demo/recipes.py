"""The settings each method trains the digits' students with, as files for `stepdistill train`.

Found by trial on the demo's teacher; they are recipes for 183k parameters, not for SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stepdistill.training.configfile import merge


@dataclass(frozen=True)
class Recipe:
    """One method's training settings; `by_steps` is laid over `common` for a student's steps.

    data_flag, data_path: the flag under --data and what the demo passes it, inside output_dir.
    """

    method: str
    common: Mapping[str, Any]
    by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    data_flag: str = "prompts_file"
    data_path: str = "data/prompts.txt"
    num_pairs: int = 0

    @property
    def needs_pairs(self) -> bool:
        return self.num_pairs > 0

    def settings(self, num_steps: int) -> dict[str, Any]:
        """The config file's content for a student of that many steps."""
        return merge({"method": self.method, **self.common}, self.by_steps.get(num_steps, {}))

    def yaml(self, num_steps: int) -> str:
        return yaml.safe_dump(self.settings(num_steps), sort_keys=False)

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
LORA: dict[str, Any] = {
    "learning_rate": 2e-3,
    "tuning": {"student": "lora", "fake": "lora", "rank": 16, "alpha": 16},
}

RECIPES: dict[str, Recipe] = {
    "dmd2": Recipe(
        "dmd2",
        merge(COMMON, {"role_learning_rates": {"fake": 2e-3}, "max_train_steps": 700}),
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
    ),
    "consistency": Recipe(
        "consistency",
        merge(
            COMMON,
            {
                "max_train_steps": 600,
                "adam_beta1": 0.9,
                "method_config": {"guidance_range": [1.0, 1.0], "target": "ema"},
            },
        ),
        data_flag="train_data_dir",
        data_path="data",
    ),
    "reflow": Recipe(
        "reflow",
        merge(
            COMMON,
            {"max_train_steps": 1500, "adam_beta1": 0.9, "method_config": {"stage": "distill"}},
        ),
        {1: {"method_config": {"num_steps": 1}}, 4: {"method_config": {"num_steps": 4}}},
        data_flag="pairs_dir",
        data_path="pairs",
        num_pairs=4096,
    ),
}


def recipe_for(method: str, student: str) -> Recipe:
    """The recipe of a method for a full or LoRA student. Errors: ValueError naming the methods."""
    if method not in RECIPES:
        raise ValueError(f"demo: expected a method of {sorted(RECIPES)}, got {method!r}.")
    recipe = RECIPES[method]
    if student == "full":
        return recipe
    rates = {role: 2 * rate for role, rate in recipe.common["role_learning_rates"].items()}
    common = merge(recipe.common, {**LORA, "role_learning_rates": rates})
    return Recipe(
        method, common, recipe.by_steps, recipe.data_flag, recipe.data_path, recipe.num_pairs
    )
