"""Frozen judges of images, differentiable in them: the table of kinds, and how a run gets its own.

A method (`Method.scorers`) or a run's rewards ask by name; the run builds the kind from SCORERS or
takes an object of the user's with Scorer's signature, which wins. Everything wrong is said before
weights load.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import nn

from stepdistill.core.method import Scorer, ScorerSpec
from stepdistill.rewards.base import FrozenScorer

# kind -> "module:Class"; modules load on demand, since each brings a library of its own.
SCORERS: dict[str, str] = {
    "aesthetic": "stepdistill.rewards.preference:AestheticScorer",
    "clip": "stepdistill.rewards.clip:CLIPScorer",
    "features": "stepdistill.rewards.features:PixelFeatures",
    "hps": "stepdistill.rewards.preference:HPSScorer",
    "lpips": "stepdistill.rewards.perceptual:LPIPSScorer",
    "pickscore": "stepdistill.rewards.preference:PickScorer",
}


def scorer_class(kind: str) -> type[FrozenScorer]:
    """The class of that kind. Errors: ValueError naming the nearest."""
    if kind not in SCORERS:
        near = difflib.get_close_matches(kind, SCORERS, n=3, cutoff=0.3)
        raise ValueError(
            f"scorers: expected a kind in {sorted(SCORERS)}, got {kind!r}. Nearest: "
            f"{near or 'none'}. Pass an object of your own as scorers={{NAME: object}}."
        )
    module, _, name = SCORERS[kind].partition(":")
    scorer: type[FrozenScorer] = getattr(import_module(module), name)
    return scorer


def check_scorers(specs: Mapping[str, ScorerSpec], given: Mapping[str, Scorer]) -> None:
    """Say what is wrong with a run's scorers; reads no weight.

    Errors: ValueError for an object nobody asks for, an unknown kind, wrong options, a missing
        file or a missing library (with its pip command); TypeError for an object that can't be
        called.
    """
    unasked = sorted(set(given) - set(specs))
    if unasked:
        raise ValueError(
            f"scorers: expected names the method asks for ({sorted(specs) or 'none'}), got "
            f"{unasked}. Turn the loss on that reads them, name them in rewards, or leave them out."
        )
    for name, spec in specs.items():
        if name not in given:
            _check_options(spec)
        elif not callable(given[name]):
            raise TypeError(
                f"scorers[{name!r}]: expected a callable (images, by) -> (B,), got "
                f"{type(given[name]).__name__}."
            )
        elif spec.kind == "features" and not all(
            hasattr(given[name], part) for part in ("blocks", "features")
        ):
            raise TypeError(
                f"scorers[{name!r}]: expected a network whose hidden states heads read (blocks, "
                f"features: core.method.PixelNet), got {type(given[name]).__name__}."
            )


def _check_options(spec: ScorerSpec) -> None:
    cls = scorer_class(spec.kind)
    try:
        cls.check(cls.read_options(spec.options))
    except ValueError as err:
        if not spec.option:
            raise
        raise ValueError(f"{spec.option}.{err}") from err


def build_scorers(
    specs: Mapping[str, ScorerSpec],
    given: Mapping[str, Scorer],
    device: torch.device | str = "cpu",
    weights: bool = True,
) -> dict[str, Scorer]:
    """The scorers a run asked for, by its names, on `device` and frozen.

    Args: given: the user's own objects; a module among them is moved and frozen too. weights:
        whether to read any; nothing is checked without.
    Errors: see `check_scorers`.
    """
    if weights:
        check_scorers(specs, given)
    built: dict[str, Scorer] = {}
    for name, spec in specs.items():
        if name in given:
            scorer = given[name]
        else:
            cls = scorer_class(spec.kind)
            scorer = cls(cls.read_options(spec.options), weights)
        if isinstance(scorer, nn.Module):
            scorer.to(device).eval().requires_grad_(False)
        built[name] = scorer
    return built
