"""What a user may say of a score gradient (losses/score.py has the formulas); no torch, for --help.

Numbers may be annealed over steps, in the form that threestudio's configurations have.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from stepdistill.core.options import Count, Guidance, Options, Positive

GradientKind = Literal["sds", "vsd", "csd", "csm", "nfsd", "bsd", "recon", "dreammat"]
GradientWeight = Literal["sigma2", "uniform", "fantasia3d", "ism", "alpha"]
GRADIENT_KINDS: tuple[GradientKind, ...] = get_args(GradientKind)


def _points(value: float | tuple[float, ...]) -> float | tuple[float, ...]:
    if not isinstance(value, tuple):
        return value
    if len(value) == 1:  # as flags give a number
        return value[0]
    steps = [0.0, value[2]] if len(value) == 3 else [value[0], *value[3::2]]
    if len(value) != 3 and (len(value) < 4 or len(value) % 2):
        rule = "a number, [v0, v1, end] or [start, v0, v1, end, v2, end2, ...]"
        raise ValueError(f"annealed value: expected {rule}, got {[*value]}.")
    if steps != sorted({*steps}):
        raise ValueError(f"annealed value: expected rising steps, got {steps} of {[*value]}.")
    return value


Annealed = Annotated[float | tuple[float, ...], AfterValidator(_points)]


def annealed(value: float | tuple[float, ...], step: int) -> float:
    """The value at that step: a number, [v0, v1, end] or [start, v0, v1, end, v2, end2, ...].

    Linear between its points, constant outside; three numbers start at step 0, as in threestudio.
    """
    if not isinstance(value, tuple):
        return value
    start, first, *rest = (0.0, *value) if len(value) == 3 else value
    for last, end in zip(rest[::2], rest[1::2], strict=True):
        if step < end:
            return first + (last - first) * max(0.0, (step - start) / (end - start))
        start, first = end, last
    return first


class GradientSettings(Options):
    """How a score gradient is weighted over times and steps, whichever it is.

    Numbers marked annealed may be [v0, v1, end], or [start, v0, v1, end, ...] in steps.
    """

    model_config = ConfigDict(frozen=True)

    weight: GradientWeight | None = None
    """Over times: sigma2, uniform, fantasia3d (alpha sigma^2), ism (sigma / alpha) or alpha; none
    means the kind's own. recon's is ism, whatever is said here."""
    negative_weight: Annealed = 0.5
    """csd: of the negative prompt, annealed; counts where there is one."""
    coefficients: tuple[Annealed, Annealed, Annealed, Annealed] = (
        *(1.05, (0.0, -1.0, -0.5, 2000.0)),
        *((0.0, 0.0, -0.5, 2000.0), 0.0),
    )
    """dreammat: of cond, null, the empty prompt and the noise, each annealed."""
    rescale: float = Field(default=0.0, ge=0, le=1)
    """recon: share of the guided x0 that takes the spread of the conditional one."""
    inversion_steps: Count = 10
    """csm: DDIM steps from the image up to x_t."""
    min_t: Annealed = 0.02
    """Least time that x_t is drawn at, annealed; 0 is data, 1 is noise."""
    max_t: Annealed = 0.98
    """Largest one, annealed: [5000, 0.98, 0.5, 5001] is ProlificDreamer's."""
    times: Literal["random", "sqrt_anneal"] = "random"
    """random: uniform between the two; sqrt_anneal: falling from max_t to min_t as the square root
    of the share of steps done."""
    max_gradient: Positive | None = None
    """Bound of every element of the gradient; none means none."""

    @model_validator(mode="after")
    def _check_times(self) -> GradientSettings:
        for step in (0, 10**9):
            low, high = annealed(self.min_t, step), annealed(self.max_t, step)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(
                    f"min_t, max_t: expected 0 < min_t <= max_t <= 1, got {low:g} and {high:g} at "
                    f"the {'end' if step else 'start'}."
                )
        return self


class ScoreGradientConfig(GradientSettings):
    """Which score gradient, and its settings."""

    kind: GradientKind = "vsd"
    """sds, vsd, csd, csm, nfsd, bsd, recon or dreammat."""
    guidance: Guidance | None = None
    """g of null + g (cond - null); none means the kind's own, a line of COEFFICIENTS. csd, csm and
    dreammat have none."""
