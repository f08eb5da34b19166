"""Options of online preference tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepdistill.core.method import ScorerSpec
from stepdistill.core.options import Options, Positive
from stepdistill.methods.own_steps import OwnStepsConfig


class RankingConfig(Options):
    """The judge that picks winners."""

    kind: str = "pickscore"
    """Kind of scorer (pickscore, clip, hps, aesthetic), or the name of an object of your own, given
    as scorers={NAME: object}."""
    options: dict[str, object] = Field(default={})
    """Options of a kind: its model, weights, ..."""

    @property
    def spec(self) -> ScorerSpec:
        """What a method asks the run for."""
        return ScorerSpec(self.kind, self.options)


class OnlinePreferenceConfig(OwnStepsConfig):
    """Options of online_preference."""

    num_steps: int = Field(default=4, ge=2)
    """Steps that the distilled model takes, as its folder's scheduler lays them; they stay."""
    reward: RankingConfig = RankingConfig()
    """What ranks two samples of a prompt."""
    beta: Positive = 50.0
    """Slope of the loss, per mean log-ratio over an image's numbers."""
    clip: float = Field(default=0.1, gt=0, lt=1)
    """A ratio further from 1 than that has no gradient."""
    trained_steps: Literal["random", "all"] = "random"
    """Steps of the two trajectories that an update learns from: one, drawn anew, or all but the
    last, at as much more memory."""
