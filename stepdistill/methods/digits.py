"""What the methods' recipes for the demo's digits share. Their teacher is judged without guidance.

Lists, not tuples: a recipe is written to a YAML file.
"""

from __future__ import annotations

from typing import Any

from stepdistill.core.recipe import First

UNGUIDED: dict[str, Any] = {"guidance_range": [1.0, 1.0]}
# Consistency training of a started model: from its own answers, in an unsquared norm.
ECT = {"solver": "data", "target": "self", "boundary": "none", "loss": "norm", **UNGUIDED}


def score(**options: Any) -> dict[str, Any]:
    """Score matching against a moving fake does better without momentum."""
    return {
        "adam_beta1": 0.0,
        "role_learning_rates": {"fake": 2e-3},
        "max_train_steps": 600,
        "method_config": {"critic_steps": 2, **options},
    }


def heads(**options: Any) -> dict[str, Any]:
    """Heads that learn much faster than the student, which has no momentum either."""
    return {
        "learning_rate": 2e-4,
        "adam_beta1": 0.0,
        "role_learning_rates": {"disc": 4e-3},
        "max_train_steps": 800,
        "method_config": {"disc_steps": 2, **options},
    }


def regression(max_train_steps: int = 2000, **options: Any) -> dict[str, Any]:
    """On the teacher's pairs, at twice the common rate."""
    rest = {"max_train_steps": max_train_steps, "method_config": options}
    return {"learning_rate": 2e-3, **rest}


def jumps(max_train_steps: int, **options: Any) -> dict[str, Any]:
    """Along the teacher's trajectory, against an average of the student."""
    options = {**UNGUIDED, "target": "ema", **options}
    return {"max_train_steps": max_train_steps, "method_config": options}


# Of the jumps whose target is one short step away: in a hundred updates an average over the last
# twenty hands too little on (emoji, 97 updates: 9.17 in four steps; over the last five 6.40).
SOON = {"ema_decay": 0.8}


def residual_recipe(max_train_steps: int = 1200, **options: Any) -> dict[str, Any]:
    """The flow map's residual along the teacher's trajectory.

    One step starts at pure noise: high times (time_mean 1.5), at a third of the common rate, where
    on emoji more updates no longer made meanflow worse. Over h = 0.01 the difference is the
    network's own change times a hundred: at low times two of three trainings of scm diverged, which
    they did not over 0.05; meanflow's high ones gain nothing by that.
    """
    options = {"guidance": 1.0, "time_mean": 0.0, "time_std": 1.5, **options}
    return {"max_train_steps": max_train_steps, "method_config": options}


# The gradient reaches the last step alone: matching each step's own x0 trains the fake on a mixture
# whose blurry first steps push the last one too far.
FEW = {
    "max_train_steps": 400,
    "method_config": {"sampler": "ode", "trained_step": "last"},
}
# One step first learns the teacher's pairs, as DMD2's one-step SDXL (arXiv:2405.14867, Sec. 5.2).
WARM = First("regression", "reflow", regression(300, stage="distill"), share=0.2)
