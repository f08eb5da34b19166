"""Judges of single images in an evaluation: CLIP score, HPSv2, an aesthetic head, or your own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.core.method import Scorer, ScorerSpec
from stepdistill.rewards import build_scorers

from .features import network_sha256


@dataclass(frozen=True)
class Judges:
    """scorers: by name. facts: model and weights' hash of each, for the protocol."""

    scorers: dict[str, Scorer]
    facts: dict[str, str]

    @classmethod
    def of(cls, options: Any, given: Mapping[str, Scorer], device: torch.device) -> Judges:
        """Those that options.clip, .hps and .aesthetic name, and the given ones.

        Errors: ValueError for a missing file or weights.
        """
        specs: dict[str, ScorerSpec] = {}
        if options.clip:
            specs["clip"] = ScorerSpec("clip", clip_options(options.clip))
        if options.hps:
            specs["hps"] = ScorerSpec("hps", {"pretrained": options.hps})
        if options.aesthetic:
            head, _, weights = options.aesthetic.partition(",")
            model = {"pretrained": weights} if weights else {}
            specs["aesthetic"] = ScorerSpec("aesthetic", {"head": head, **model})
        built = build_scorers(specs, {}, device)
        scorers = {**built, **given}
        facts = {
            name: ", ".join(f"{key} {value}" for key, value in specs[name].options.items())
            if name in specs
            else type(scorer).__name__
            for name, scorer in scorers.items()
        }
        for name, scorer in scorers.items():
            if isinstance(scorer, torch.nn.Module):
                facts[name] += f", sha256 {network_sha256(scorer)[:16]}"
                facts[name] += f", {scorer.activation}" if hasattr(scorer, "activation") else ""
        return cls(scorers, facts)


def clip_options(text: str) -> dict[str, str | None]:
    """Options of a CLIP scorer from MODEL[,WEIGHTS]."""
    model, _, weights = text.partition(",")
    return {"model": model, "pretrained": weights or None}
