"""Rewards: a run's judges of the student's own samples, added to the loss of any method.

Where a phase trains the student, its sampler is run without gradients up to one step k, whose x0 is
decoded and judged with them: the last step where the sampler is deterministic, any where it noises
anew, as each x0 is then shown to the next step as an image. A loss that has such a sample hands it
over (`Losses.sample`), and nothing is drawn.
Sources: Xu et al. 2023, arXiv:2304.05977 (ReFL); Clark et al. 2023, arXiv:2309.17400 (DRaFT-1); Ren
et al. 2024, arXiv:2404.13686 (Hyper-SD's feedback).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.rewards import RewardConfig
from stepdistill.config.run import TrainConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase, Scorer, ScorerSpec
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.rewards import reward_loss
from stepdistill.rewards import scorer_class
from stepdistill.training.by_shape import MethodByShape

AddRewards = Callable[[Nets, Batch, Ctx, Losses], Losses]


def scorers_of(method: Method[Any], rewards: Sequence[RewardConfig]) -> dict[str, ScorerSpec]:
    """Judges that a method's losses and a run's rewards call, by name.

    Errors: ValueError for a kind that the method has already, with options of its own.
    """
    specs = {one.kind: ScorerSpec(one.kind, one.options) for one in rewards}
    of_method = method.scorers()
    if twice := sorted(specs.keys() & of_method.keys()):
        raise ValueError(
            f"rewards: expected kinds that {method.name} does not judge by itself, got {twice}. "
            "Leave them out here, or turn its own loss off."
        )
    return {**of_method, **specs}


def check_kinds(
    method: Method[Any], rewards: Sequence[RewardConfig], given: Mapping[str, Scorer]
) -> frozenset[str]:
    """Batch fields that the rewards read; loads no weight.

    Errors: ValueError for a kind that judges by another image, options of a user's object, or a
        method that is nothing without rewards and has none.
    """
    if method.needs_rewards and not rewards:
        raise ValueError(
            f"{method.name}: expected rewards, got none. Name a judge of the samples, such as "
            '--rewards \'{"kind": "clip", "weight": 0.1, "tau": 0.35}\'.'
        )
    needs: set[str] = set()
    for one in rewards:
        if one.kind in given and one.options:
            raise ValueError(
                f"rewards: expected no options of your own object {one.kind!r}, got "
                f"{sorted(one.options)}. Set them on the object."
            )
        judges_by = "nothing" if one.kind in given else scorer_class(one.kind).judges_by
        if judges_by == "images":
            raise ValueError(
                f"rewards: expected a kind that judges an image alone or by its prompt, got "
                f"{one.kind!r}, a distance of two images. Name clip, hps, pickscore or aesthetic."
            )
        needs |= {"prompts"} if judges_by == "prompts" else set()
    return frozenset(needs)


class Rewards:
    """A run's rewards. Args: by_shape: the run's method, for the sampler of each batch's shape."""

    def __init__(self, args: TrainConfig, by_shape: MethodByShape) -> None:
        self._configs, self._crop, self._by_shape = args.rewards, args.reward_crop, by_shape
        side = max(by_shape.shape[-2:])
        if self._crop is not None and self._crop >= side:
            warnings.warn(
                f"reward_crop {self._crop} has no effect: latents of this run have {side} to a "
                "side. Set a smaller one, or leave it out.",
                stacklevel=2,
            )

    def due(self, phase: Phase, step: int, shape: tuple[int, ...]) -> AddRewards | None:
        """What adds the rewards of that student step to a phase's losses; None where none is due.

        Args: shape: (C, *S) of the batch.
        """
        due = [one for one in self._configs if step % one.every == 0]
        if not due or "student" not in phase.trains:
            return None
        method = self._by_shape.at(shape)

        def add(nets: Nets, batch: Batch, ctx: Ctx, losses: Losses) -> Losses:
            spec = method.sampler_at(ctx.step, ctx.max_steps)
            return with_rewards(losses, nets, batch, ctx, spec, due, self._crop)

        return add


def with_rewards(
    losses: Losses,
    nets: Nets,
    batch: Batch,
    ctx: Ctx,
    spec: SamplerSpec,
    rewards: Sequence[RewardConfig],
    crop: int | None = None,
) -> Losses:
    """A phase's losses with those of the rewards, and the mean score of each to log.

    Args: spec: how the student is sampled. crop: side, in latents, of the square that is decoded.
    """
    ctx = replace(ctx, phase=f"{ctx.phase}/reward")  # its draws leave the method's as they were
    trains = any(one.weight > 0 for one in rewards)
    sample = losses.sample if losses.sample is not None else drawn(nets, batch, ctx, spec)
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        images = nets.images(sample if crop is None else cropped(sample, crop, ctx))
    by = batch.prompts or ("",) * batch.bsz
    for one in rewards:
        score = nets.scorer(one.kind)(images if one.weight > 0 else images.detach(), by)
        logs = {f"reward_{one.kind}": score.mean()}
        loss = reward_loss(score, one.tau) if one.weight > 0 else torch.zeros_like(losses.total)
        losses = losses.plus(one.weight, loss, **logs)
    return losses


def drawn(nets: Nets, batch: Batch, ctx: Ctx, spec: SamplerSpec) -> Tensor:
    """x0 (B, C, *S) of the student's sampler at one step, which alone has a graph; the same step on
    all ranks."""
    last, shape = spec.num_steps - 1, (batch.bsz, *batch.shape)
    null = batch.null if spec.guidance != 1.0 else None
    return sample_x0(
        nets["student"],
        spec,
        ctx.randn(shape),
        batch.cond,
        null,
        fresh_noise=lambda _: ctx.randn(shape),
        gradient_at=ctx.shared_randint(0, last + 1) if spec.kind == "renoise" else last,
    )


def cropped(x: Tensor, side: int, ctx: Ctx) -> Tensor:
    """A square (B, C, *S) of that side at most, at a place drawn for all."""
    for dim in (-2, -1):
        size = min(side, x.shape[dim])
        x = x.narrow(dim, ctx.shared_randint(0, x.shape[dim] - size + 1), size)
    return x
