"""Rewards of a run: judges of the student's samples, beside any method's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from stepdistill.core.options import Options


class RewardConfig(Options):
    """One judge. Its loss is weight * mean max(0, tau - score), or weight * mean(-score)."""

    kind: str
    """Kind of scorer (clip, hps, pickscore, aesthetic), or the name of an object of your own, given
    as scorers={NAME: object}."""
    weight: float = Field(ge=0)
    """Weight of its loss; 0 keeps it out of training: it is logged, and the watchdog tells where it
    falls while a trained one rises."""
    tau: float | None = None
    """Score from which on a sample is good enough and costs nothing (ReFL, Hyper-SD), such as clip
    0.35, hps 0.3, pickscore 0.23, aesthetic 6.5; none: no score is (DRaFT)."""
    every: int = Field(default=1, ge=1)
    """Student updates from one use to the next."""
    options: dict[str, Any] = Field(default={})
    """Options of a kind: its model, weights, ..."""


def trained(rewards: Sequence[RewardConfig]) -> list[str]:
    """Kinds that the student learns from."""
    return [one.kind for one in rewards if one.weight > 0]


def watched(rewards: Sequence[RewardConfig]) -> list[str]:
    """Kinds that are kept out of training."""
    return [one.kind for one in rewards if one.weight == 0]


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """Errors: ValueError for a kind said twice, or where the student learns from none."""
    kinds = [one.kind for one in rewards]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ValueError(f"rewards: expected each kind once, got {twice} twice")
    if rewards and not trained(rewards):
        raise ValueError(
            f"rewards: expected one with a weight above 0, got none of {kinds}. Set a weight, or "
            "leave them out"
        )
