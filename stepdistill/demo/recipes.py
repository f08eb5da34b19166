"""The settings each method trains the digits' students with, as files for `stepdistill train`.

Found by trial on the demo's teacher; they are recipes for 183k parameters, not for SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepdistill.config.flags import merge

# Options that count student updates: they keep their share of a run that is longer or shorter.
COUNTED_OPTIONS = ("anneal_steps",)


@dataclass(frozen=True)
class Training:
    """One `stepdistill train`. settings: its config file's content, max_train_steps included.

    data: "prompts", "images" or "pairs". share: of the student's time budget. starts_from: the
    teacher, the student of the training before (init_student_from), or that one's export as the
    model, teacher and student alike.
    """

    label: str
    settings: Mapping[str, Any]
    data: str
    share: float = 1.0
    starts_from: Literal["teacher", "student", "model"] = "teacher"

    def lasting(self, updates: int) -> dict[str, Any]:
        """The settings of a run of that many student updates."""
        options = dict(self.settings.get("method_config", {}))
        for name in COUNTED_OPTIONS:
            if name in options:
                done = options[name] / self.settings["max_train_steps"]
                options[name] = max(1, round(done * updates))
        return merge(self.settings, {"max_train_steps": updates, "method_config": options})


@dataclass(frozen=True)
class Recipe:
    """One method's training settings; `by_steps` is laid over `common` for a student's steps.

    claims: the step counts it is meant for. one_student: a single training serves all of them.
    first: a training before the method's own, for students of `first_steps` steps.
    layouts: the students it can train.
    """

    method: str
    common: Mapping[str, Any]
    by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    data: str = "prompts"
    claims: tuple[int, ...] = (1, 2, 4)
    one_student: bool = False
    first: Training | None = None
    first_steps: tuple[int, ...] = ()
    starts_from: Literal["student", "model"] = "student"
    layouts: tuple[str, ...] = ("full", "lora")

    @property
    def needs_pairs(self) -> bool:
        return "pairs" in {self.data, *([self.first.data] if self.first else [])}

    def settings(self, num_steps: int) -> dict[str, Any]:
        """The config file's content for a student of that many steps."""
        return merge({**self.common, "method": self.method}, self.by_steps.get(num_steps, {}))

    def trainings(self, num_steps: int) -> list[Training]:
        """What trains a student of that many steps, in order."""
        own = Training(self.method, self.settings(num_steps), self.data)
        if self.first is None or num_steps not in self.first_steps:
            return [own]
        rest = replace(own, share=1.0 - self.first.share, starts_from=self.starts_from)
        return [self.first, rest]

    def describe(self) -> str:
        """Batch and rates in a few words."""
        rates = {"student": self.common["learning_rate"], **self.common["role_learning_rates"]}
        told = ", ".join(f"{role} {rate:g}" for role, rate in rates.items())
        return f"batch {self.common['train_batch_size']}, learning rates {told}"


def _options(**options: Any) -> dict[str, Any]:
    return {"method_config": options}


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
# Regression wants momentum; score matching against a moving fake does better without.
MOMENTUM = merge(COMMON, {"adam_beta1": 0.9})
REGRESSION = merge(MOMENTUM, {"method": "reflow", "learning_rate": 2e-3, "max_train_steps": 300})
# One step first learns the teacher's pairs, as DMD2's one-step SDXL (arXiv:2405.14867, Sec. 5.2).
WARM = Training("regression", merge(REGRESSION, _options(stage="distill")), "pairs", 0.2)
# An adapter of 183k parameters' projections and convolutions wants twice the rate of full tuning.
LORA: dict[str, Any] = {
    "tuning": {"student": "lora", "fake": "lora", "rank": 16, "alpha": 16},
}

# The teacher is judged without guidance, and so are its students.
UNGUIDED = {"guidance_range": [1.0, 1.0]}
JUMPS = {**UNGUIDED, "loss": "l2", "target": "ema"}
SCORE = merge(COMMON, {"role_learning_rates": {"fake": 2e-3}, "max_train_steps": 600})
ONE = _options(num_steps=1, guidance=1.0, critic_steps=2)


def _few(num_steps: int) -> dict[str, Any]:
    """The gradient reaches the last step alone: matching each step's own x0 trains the fake on a
    mixture whose blurry first steps push the last one too far."""
    options = {"sampler": "ode", "trained_step": "last", "guidance": 1.0, "critic_steps": 2}
    return {"max_train_steps": 400, **_options(num_steps=num_steps, **options)}


def _each(name: str, *counts: int) -> dict[int, dict[str, Any]]:
    """The option `name` equal to the number of steps."""
    return {count: _options(**{name: count}) for count in counts}


# Most of the run belongs to the last stage, whose one segment any number of steps crosses.
STAGES = {"segments": [8, 4, 2, 1], "stage_starts": [0.05, 0.12, 0.25]}
SMALL = {"student": "full", "student_config": {"block_out_channels": [8, 24]}}

RECIPES: dict[str, Recipe] = {
    "dmd2": Recipe("dmd2", SCORE, {1: ONE, 2: _few(2), 4: _few(4)}, first=WARM, first_steps=(1,)),
    "dmd": Recipe(
        "dmd",
        merge(SCORE, _options(num_steps=1, guidance=1.0, critic_steps=2, regression="l2")),
        data="pairs",
        claims=(1,),
    ),
    "f_distill": Recipe(
        "f_distill",
        SCORE,
        {1: ONE, 2: _few(2), 4: _few(4)},
        data="images",  # of the ratio's head
        first=WARM,
        first_steps=(1,),
    ),
    "vsd": Recipe(
        "vsd",
        # The null prompt serves a guided fake alone.
        merge(SCORE, _options(num_steps=1, guidance=1.0, critic_steps=2, null_probability=0.0)),
        claims=(1,),
        first=WARM,
        first_steps=(1,),
    ),
    "snoopi": Recipe(
        "vsd",
        merge(SCORE, _options(num_steps=1, guidance_range=[0.5, 1.5], critic_steps=2)),
        claims=(1,),
        first=WARM,
        first_steps=(1,),
    ),
    "consistency": Recipe(
        "consistency",
        merge(MOMENTUM, {"max_train_steps": 1200, **_options(**UNGUIDED, target="ema")}),
        _each("num_steps", 1, 2, 4),
        data="images",
        one_student=True,
    ),
    "pcm": Recipe(
        "pcm",
        merge(MOMENTUM, {"max_train_steps": 1200, **_options(**JUMPS)}),
        _each("num_phases", 2, 4),
        data="images",
        claims=(2, 4),
    ),
    "tscd": Recipe(
        "tscd",
        merge(MOMENTUM, {"max_train_steps": 1500, **_options(**JUMPS, **STAGES)}),
        _each("num_steps", 1, 2, 4),
        data="images",
        one_student=True,
    ),
    "tscd_one_lora": Recipe(
        "tscd",
        merge(
            MOMENTUM,
            {
                **LORA,
                "learning_rate": 2e-3,
                "max_train_steps": 1500,
                **_options(**JUMPS, **STAGES, sampler="tcd", gamma=0.3),
            },
        ),
        _each("num_steps", 1, 2, 4, 8),
        data="images",
        claims=(1, 2, 4, 8),
        one_student=True,
        layouts=("lora",),
    ),
    "lora_guidance": Recipe(
        "lora_guidance",  # halving alone: there is no guidance to fold in
        merge(
            MOMENTUM,
            {
                "lr_scheduler": "constant",  # each round has its own falling rate
                "max_train_steps": 1500,
                **_options(guidance=1.0, guidance_stage=False, anneal=True),
            },
        ),
        {n: _options(num_steps=[k for k in (8, 4, 2, 1) if k >= n]) for n in (1, 2, 4)},
        data="images",
    ),
    "reflow": Recipe(
        "reflow",
        merge(REGRESSION, {"max_train_steps": 2000, **_options(stage="distill")}),
        _each("num_steps", 1, 2, 4),
        data="pairs",
    ),
    "rfpp": Recipe(
        "rfpp",
        # No LPIPS: its network was made for photographs of 64 px and more.
        merge(REGRESSION, {"max_train_steps": 2000, **_options(perceptual="none")}),
        _each("num_steps", 1, 2, 4),
        data="pairs",
        one_student=True,
    ),
    "slimflow": Recipe(
        "slimflow",
        merge(REGRESSION, {"max_train_steps": 1000, **_options(stage="distill")}),
        data="pairs",
        claims=(1,),
        first=Training(
            "small student",
            merge(
                REGRESSION,
                {
                    "method": "slimflow",
                    "tuning": SMALL,
                    "max_train_steps": 2000,
                    **_options(stage="reflow", setup="raw", anneal_steps=1000),
                },
            ),
            "pairs",
            0.6,
        ),
        first_steps=(1,),
        starts_from="model",
        layouts=("full",),
    ),
}


def recipe_for(name: str, student: str) -> Recipe:
    """The recipe of that name for a full or LoRA student. Errors: ValueError naming the choices."""
    if name not in RECIPES:
        raise ValueError(f"demo: expected a method of {sorted(RECIPES)}, got {name!r}.")
    recipe = RECIPES[name]
    if student not in recipe.layouts:
        raise ValueError(
            f"demo: expected a student of {recipe.layouts} with {name}, got {student!r}."
        )
    if student == "full" or recipe.layouts == ("lora",):
        return recipe
    first = recipe.first and replace(recipe.first, settings=as_lora(recipe.first.settings))
    return replace(recipe, common=as_lora(recipe.common), first=first)


def as_lora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with adapters in place of copies, at twice the learning rates."""
    rates = {role: 2 * rate for role, rate in settings["role_learning_rates"].items()}
    doubled = {"learning_rate": 2 * settings["learning_rate"], "role_learning_rates": rates}
    return merge(settings, {**LORA, **doubled})
