"""Options of rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from stepdistill.core.abilities import Abilities
from stepdistill.core.method import MethodConfig
from stepdistill.core.path import VEPath
from stepdistill.core.times import most_steps
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.perceptual import PairDistance, judged


class ReflowConfig(MethodConfig):
    stage: Literal["reflow", "distill"] = "reflow"
    """reflow: velocity regression at all times; distill: x0 regression on the sampler's grid."""
    setup: Literal["wrapped", "raw"] = "wrapped"
    """wrapped: the teacher's path and prediction; raw: the output is velocity on a flow path."""
    t_range: tuple[float, float] = (1e-3, 1.0)
    """Rectified-flow times of stage reflow, uniform; VP tables and EDM reach less: clamped."""
    loss: PairDistance = "l2"
    """Distance of stage distill, of latents or (lpips, one step only) of decoded images, or the sum
    of l2 and lpips; stage reflow takes l2 (others bias its mean)."""
    lpips: LPIPSOptions = LPIPSOptions()
    """Options of lpips."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""
    num_steps: int = Field(default=1, ge=1)
    """Sampling steps; in stage distill also the size k of the trained grid."""
    student_times: tuple[float, ...] | None = None
    """The trained grid of stage distill itself, descending in (0, 1]; overrules num_steps. (0.4,)
    warms up DMD2's one-step SDXL: pure noise in, conditioning index 399."""

    @classmethod
    def unfit(cls, options: Mapping[str, Any], model: Abilities) -> dict[str, tuple[Any, str]]:
        """See MethodConfig.unfit."""
        if not isinstance(model.path, VEPath):
            return {}
        made: dict[str, tuple[Any, str]] = {}
        if options.get("setup") == "raw":
            made["setup"] = ("wrapped", "the preconditioning of an EDM-type model is no velocity")
        wanted = options.get("num_steps", 1)
        most = most_steps(model.path, wanted)
        if options.get("stage", "reflow") == "reflow" and most < wanted:  # sampled so, not trained
            made["num_steps"] = (most, "more of its steps fall on one time of this model")
        return made

    @model_validator(mode="after")
    def _check(self) -> ReflowConfig:
        if not 0 < self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"t_range: expected 0 < low < high <= 1, got {self.t_range}.")
        if self.stage == "reflow" and self.loss != "l2":
            raise ValueError(f"loss: expected 'l2' in stage reflow, got {self.loss!r}.")
        times = self.student_times
        num_trained = self.num_steps if times is None else len(times)
        if judged(self.loss) and num_trained != 1:
            raise ValueError(
                f"loss: expected {self.loss!r} with one trained time, got {num_trained}. At noisy "
                "inputs x0 is a mean, which is no image; take l2, l1 or huber."
            )
        if times is not None:
            falls = all(a > b for a, b in pairwise(times))
            if (
                self.stage == "reflow"
                or not times
                or not falls
                or not 0 < times[-1] <= times[0] <= 1
            ):
                raise ValueError(
                    "student_times: expected descending times in (0, 1] and stage distill, got "
                    f"{times} in stage {self.stage}."
                )
        return self
