"""How to sample the student of a run that stopped before its plan ended."""

from __future__ import annotations

import warnings
from typing import Any

from stepdistill.core.method import Method
from stepdistill.core.solvers import SamplerSpec
from stepdistill.reporting.values import counted


def sampler_at_stop(
    method: Method[Any], step: int, max_steps: int, num_steps: int | None = None
) -> SamplerSpec:
    """The sampler of a student after `step` of max_steps updates, in num_steps or its own number.

    Warns where it is not the finished run's. Errors: ValueError for steps off the grid reached.
    """
    planned, actual = method.sampler(), method.sampler_at(step, max_steps)
    if planned.times != actual.times:
        warnings.warn(
            f"export: training stopped at update {step} of {max_steps}, before its last grid. The "
            f"student is sampled on the grid that it reached, in "
            f"{counted(actual.num_steps, 'step')} and not in {planned.num_steps}. Train on: "
            "--resume_from_checkpoint latest.",
            stacklevel=3,
        )
    return actual if num_steps is None else method.sampler_at(step, max_steps, num_steps)
