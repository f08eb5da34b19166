"""Options of lora_guidance: the guidance stage, then rounds that halve the steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from stepdistill.core.abilities import Abilities
from stepdistill.core.method import MethodConfig
from stepdistill.core.recipe import Recipe
from stepdistill.losses.progressive import HalvingWeight
from stepdistill.methods.stages import check_stage_starts, stage_at, stage_begins

# Halving alone: there is no guidance to fold in. Each round has its own falling rate.
DIGITS = Recipe(
    "lora_guidance",
    {
        "lr_scheduler": "constant",
        "max_train_steps": 1500,
        "method_config": {"guidance": 1.0, "guidance_stage": False, "anneal": True},
    },
    {n: {"method_config": {"num_steps": [k for k in (8, 4, 2, 1) if k >= n]}} for n in (1, 2, 4)},
)


class LoRAGuidanceConfig(MethodConfig):
    guidance: float = Field(default=7.5, ge=0)
    """Guidance g that is folded in; with embed_guidance the g that the sampler tells."""
    embed_guidance: bool = False
    """Draw g from guidance_range and tell the student w = g - 1 (full students of families with a
    guidance embedding only)."""
    guidance_range: tuple[float, float] | None = None
    """Range of g under embed_guidance, uniform per sample. g = w + 1."""
    loss_on: Literal["raw", "x0", "eps", "v", "flow"] = "raw"
    """The view whose squared error the guidance stage minimises; raw is the network's output."""
    states: Literal["data", "trajectory"] = "data"
    """Where the student is trained: noised data, or the teacher's own trajectories from noise,
    which need prompts alone and are what sampling visits (several teacher calls an update)."""
    trajectory_steps: int = Field(default=16, ge=1)
    """Teacher steps of a whole trajectory in the guidance stage; read with trajectory alone."""
    teacher_steps: int = Field(default=50, ge=1)
    """Sampling steps of a student without halving rounds: the teacher's."""
    guidance_stage: bool = True
    """Fold guidance in first. Without it the guided teacher itself teaches the first round."""
    num_steps: tuple[int, ...] = ()
    """Student steps of the halving rounds, each half of the one before; none keeps the teacher's
    step count. The first round's teacher takes twice its steps."""
    stage_starts: tuple[float, ...] | None = None
    """Where the stages after the first begin: fractions of max_train_steps below 1, or student
    steps from 1 on; none means stages of equal length."""
    halving_weight: HalvingWeight = "snr_trunc"
    """Weight of the x0 error in halving rounds: max(SNR, 1), 1 + SNR, or that of flow errors."""
    stage_rates: tuple[float, ...] | None = None
    """Factor on the learning rate in each stage; none means 1 throughout."""
    anneal: bool = False
    """Let the learning rate fall linearly to 0 within each stage."""

    @classmethod
    def unfit(cls, options: Mapping[str, Any], model: Abilities) -> dict[str, tuple[Any, str]]:
        """See MethodConfig.unfit."""
        guided = options.get("guidance") != 1.0 or options.get("embed_guidance")
        if guided or not options.get("guidance_stage") or not options.get("num_steps"):
            return {}
        why = "there is no guidance to fold in"
        of_stages = [name for name in ("stage_starts", "stage_rates") if options.get(name)]
        return {"guidance_stage": (False, why), **dict.fromkeys(of_stages, (None, why))}

    @model_validator(mode="after")
    def _check(self) -> LoRAGuidanceConfig:
        span = self.guidance_range
        if self.embed_guidance != (span is not None):
            raise ValueError(
                "guidance_range: expected it exactly with embed_guidance (a student that is not "
                f"told g has one answer), got {span} with embed_guidance {self.embed_guidance}."
            )
        if span is not None and not 0 <= span[0] < span[1]:
            raise ValueError(f"guidance_range: expected 0 <= low < high, got {span}.")
        if span is not None and not span[0] <= self.guidance <= span[1]:
            raise ValueError(
                f"guidance: expected a value inside guidance_range {span}, got {self.guidance}. "
                "The embedding is trained on no other."
            )
        steps = self.num_steps
        if any(n < 1 for n in steps) or any(a != 2 * b for a, b in pairwise(steps)):
            raise ValueError(
                f"num_steps: expected step counts that halve, such as (8, 4, 2), got {steps}."
            )
        if not self.guidance_stage and not steps:
            raise ValueError("num_steps: expected halving rounds without guidance_stage, got none.")
        check_stage_starts(self.stage_starts, len(self.stages))
        if self.stage_rates is not None and (
            len(self.stage_rates) != len(self.stages) or min(self.stage_rates) <= 0
        ):
            raise ValueError(
                f"stage_rates: expected {len(self.stages)} factors > 0, one for each stage, got "
                f"{self.stage_rates}."
            )
        return self

    def check_kind(self, kind: str) -> None:
        """Errors: ValueError for step counts that such a network can't be halved to."""
        if kind == "eps" and self.num_steps and self.num_steps[-1] <= 2:
            raise ValueError(
                "num_steps: expected at least 4 steps of an eps-prediction teacher, got "
                f"{self.num_steps[-1]}: at t = 1 its x0 divides by an alpha near 0. Stop at 4, "
                "or take a v-prediction or flow teacher."
            )

    def check_own_student(self) -> None:
        """Errors: ValueError for a stage that a student with the teacher's weights has nothing to
        learn in."""
        if self.guidance_stage and self.guidance == 1.0 and not self.embed_guidance:
            raise ValueError(
                "guidance: expected a value other than 1 in the guidance stage, got 1: the teacher "
                "is its own student. Set guidance_stage: false to halve steps alone, or train a "
                "student of other sizes (tuning.student_config)."
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Student steps of each stage; 0 stands for the guidance stage."""
        return (0, *self.num_steps) if self.guidance_stage else self.num_steps

    def stage_of(self, step: int, max_steps: int) -> int:
        """The stage that student step `step` belongs to."""
        return stage_at(step, stage_begins(len(self.stages), self.stage_starts, max_steps))

    def rate_scale(self, step: int, max_steps: int) -> float:
        """Factor on the learning rate at student step `step`."""
        begins = stage_begins(len(self.stages), self.stage_starts, max_steps)
        stage = stage_at(step, begins)
        factor = 1.0 if self.stage_rates is None else self.stage_rates[stage]
        end = (*begins[1:], max_steps)[stage]
        left = (end - step) / (end - begins[stage])
        return factor * left if self.anneal else factor
