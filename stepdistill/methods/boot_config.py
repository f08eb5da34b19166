"""Options of boot."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stepdistill.core.method import MethodConfig


def one_step(num_steps: int) -> int:
    """Errors: ValueError for another number than 1."""
    if num_steps != 1:
        raise ValueError(
            f"num_steps: expected 1 (the student answers pure noise alone), got {num_steps}. "
            "consistency and tscd serve several."
        )
    return num_steps


def _two_times(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value and (not all(0.0 < t <= 1.0 for t in value) or value[0] == value[1]):
        raise ValueError(f"told_times: expected two different times in (0, 1], got {value}.")
    return value


class BOOTConfig(MethodConfig):
    """Options of boot."""

    num_grid: int = Field(default=50, ge=1)
    """Teacher steps K of a trajectory, each learned from the one before it; divides a VP table."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Teacher step: ddim (Euler on flow), or heun (2nd order, two calls)."""
    guidance: float = Field(default=7.5, ge=0)
    """Guidance g of the teacher in both losses, null + g (cond - null); 1 means none."""
    told_times: Annotated[tuple[float, float] | None, AfterValidator(_two_times)] = None
    """Times that the student is told for clean data, its one step at inference, and for the
    trajectory's start; the grid's others lie evenly between. None means (0.5, 1.0), where the
    student's first answer at the start is right already; on VE paths and of eps networks (1.0,
    0.5): these answer pure noise well at 1 alone (letters, 180 s: distance 18.7, else 106.1).
    Begin at 1 for a pipeline whose call takes neither timesteps nor sigmas."""
    boundary_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of samples that learn the trajectory's start, without which all others drift."""
    boundary_weight: float = Field(default=1.0, gt=0)
    """Weight beta of their mean loss beside that of the others."""
    weight: Literal["none", "rate"] = "rate"
    """Weight of a bootstrapped sample: none, or 1 / (1 - l_s / l_t)^2, of the ODE's residual."""
    num_steps: Annotated[int, AfterValidator(one_step)] = 1
    """Sampling steps: 1, for the student's input is pure noise whatever time it is told."""
