"""Options of slimflow."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stepdistill.methods.reflow_config import ReflowConfig


class SlimFlowConfig(ReflowConfig):
    """Options of slimflow, besides reflow's."""

    anneal: Literal["linear", "cos", "exp", "fixed"] = "linear"
    """Law of b over student updates, as released: 1 - k / K, (1 + cos(pi k / K)) / 2, exp(-k / K),
    or anneal_fixed throughout."""
    anneal_steps: int = Field(default=300000, ge=1)
    """K, the student updates after which b is 0; of exp, after which it is 1 / e."""
    anneal_fixed: float = Field(default=0.0, ge=0, le=1)
    """b of anneal fixed."""
    flip: Literal["none", "batch", "sample"] = "none"
    """Mirror noise and x0 together, by one coin a batch (released code) or one a sample. For
    teachers that treat left and right alike; not for prompts that name them."""
    guide_weight: float = Field(default=1.0, ge=0)
    """Weight of stage distill's online term; 0 leaves plain distillation."""
    guide_range: tuple[float, float] = (0.2, 0.8)
    """Rectified-flow times between the teacher's two steps, uniform."""
    guide_first: Literal["student", "teacher"] = "student"
    """Who takes the first of the two steps; the student's costs no call."""
    start_time: float = Field(default=1.0, gt=0, le=1)
    """Time told to stage distill's one call, of pure noise all the same; 0.999 as released."""
    guidance: float = Field(default=1.0, ge=0)
    """The teacher's guidance in stage distill, g of null + g (cond - null)."""

    @model_validator(mode="after")
    def _one_step(self) -> SlimFlowConfig:
        low, high = self.guide_range
        if not 0 < low < high < self.start_time:
            raise ValueError(f"guide_range: expected 0 < low < high < start_time, got {low, high}.")
        if self.stage == "distill" and self.setup == "raw":
            raise ValueError(
                "setup: expected 'wrapped' in stage distill, got 'raw': the teacher of that stage "
                "is the straight model itself, exported by stage reflow with its own scheduler."
            )
        if self.stage == "distill" and (self.num_steps > 1 or self.student_times is not None):
            raise ValueError(
                f"num_steps: expected 1 and no student_times in stage distill, got "
                f"{self.num_steps} and {self.student_times}. reflow distils to k steps."
            )
        return self
