"""One call for every network: `denoiser(x_t, t, cond) -> Prediction`.

Guidance lives here and only here: null + g (cond - null), g = 1 means none; a model whose own
pipeline guides otherwise overrides `Denoiser.guide`. Cond and null run as one batch of 2B. Because
x0, eps, v and flow are affine in the raw output at fixed x_t, guiding the raw output guides them.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stepdistill.core.path import NoisePath, PredictionType, expand, full
from stepdistill.core.types import Cond


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's answer at (x_t, t), readable as any prediction type.

    raw:      (B, C, *S) what the network returned (guided where guidance was asked for).
    kind:     its type; `x0`, `eps`, `v`, `flow` convert through x0 in float32 or better.
    features: block name -> hidden states of the conditional half, where they were asked for.
    unguided: (B, C, *S) the raw output under the condition alone, where `raw` is guided by two.
    """

    raw: Tensor
    x_t: Tensor
    t: Tensor
    path: NoisePath
    kind: PredictionType
    features: Mapping[str, Tensor] = field(default_factory=dict)
    unguided: Tensor | None = None

    def as_type(self, dst: PredictionType) -> Tensor:
        return self.path.convert(self.raw, self.x_t, self.t, self.kind, dst)

    @cached_property
    def x0(self) -> Tensor:
        return self.as_type("x0")

    @cached_property
    def eps(self) -> Tensor:
        return self.as_type("eps")

    @cached_property
    def v(self) -> Tensor:
        return self.as_type("v")

    @cached_property
    def flow(self) -> Tensor:
        return self.as_type("flow")

    def step(self, s: Tensor, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """x_s (B, C, *S) after one universal DDIM step (see NoisePath.step)."""
        return self.path.step(self.x0, self.x_t, self.t, s, eta, noise)


def is_guided(guidance: float | Tensor | None) -> bool:
    """Whether a null pass is needed. A tensor always needs one: reading it would sync."""
    return guidance is not None and (isinstance(guidance, Tensor) or guidance != 1.0)


def linear_guidance(cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
    """null + g (cond - null) of outputs (B, C, *S); guidance: a number or (B,)."""
    g = expand(guidance, cond) if isinstance(guidance, Tensor) else guidance
    return null + g * (cond - null)


def _embedded(guidance: float | Tensor | None, x_t: Tensor) -> Tensor:
    """(B,) w = g - 1, float32 on the device of x_t (B, ...)."""
    g = torch.as_tensor(guidance, dtype=torch.float32, device=x_t.device)
    return (g - 1.0).expand(x_t.shape[0])


class Denoiser(ABC):
    """Anything that can be asked for a prediction: a role of a RoleBank, or an analytic teacher.

    embeds_guidance: the network is told the guidance itself, so no null pass is made (Flux.1-dev).
    has_null: there is an empty condition to guide away from.
    """

    path: NoisePath
    kind: PredictionType
    embeds_guidance: bool = False
    has_null: bool = True
    null_skips: tuple[str, ...] = ()  # blocks that the null pass of guidance leaves out
    end: Tensor | None = None  # (B,) where this call's jump ends

    def skipping(self, blocks: Sequence[str]) -> Denoiser:
        """The same with skip-layer guidance: null passes without these blocks, in a call apart.

        Args: blocks: by the family's names; none gives this denoiser itself.
        """
        other = copy.copy(self) if blocks else self
        if blocks:
            other.null_skips = tuple(blocks)
        return other

    def without(self, blocks: Sequence[str]) -> AbstractContextManager[None]:
        """Within: calls in which these blocks give back their input."""
        raise ValueError(
            f"denoiser: expected no blocks to leave out of {type(self).__name__}, got {blocks}."
        )

    @contextmanager
    def remembered(self) -> Iterator[Callable[[Tensor, Cond], None] | None]:
        """Within: a causal network that is asked for one chunk of frames at a time, and a function
        that has it remember a finished one (x0 (B, C, F, H, W), cond) for those that follow; None
        where it remembers nothing, and is told the past in every call."""
        yield None

    @abstractmethod
    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bare network call: (B, C, *S) output and the captured features."""

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, names: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """Hidden states of these blocks alone; cheaper than a prediction where they lie early.

        Args: x_t: (B, C, *S). t: (B,). names: at least one block.
        """
        return self.raw(x_t, t, cond, None, names)[1]

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """The guided output (B, C, *S) of the two raw ones, float32 or better."""
        return linear_guidance(cond, null, guidance)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        null: Cond | None = None,
        guidance: float | Tensor | None = None,
        w: Tensor | None = None,
        features: Sequence[str] = (),
        s: Tensor | None = None,
    ) -> Prediction:
        """The prediction at x_t, guided where `guidance` is not None or 1.

        Args:
            x_t: (B, C, *S). t: (B,); of a network that is told a time for each latent frame of a
                video, (B, F).
            guidance: g of null + g (cond - null), a number or (B,).
            w: (B,) guidance told to the network itself (LCM's embedding, w = g - 1).
            features: names of blocks whose hidden states the Prediction should carry.
            s: (B,) time at which the jump from t ends, told to a role with that extra input;
                without guidance.
        """
        if s is not None:
            ending = copy.copy(self)
            ending.end = s
            return ending(x_t, t, cond, w=w, features=features)
        of_frames = x_t.ndim == 5 and t.shape == (len(x_t), x_t.shape[2])
        if t.shape != (len(x_t),) and not of_frames:
            raise ValueError(
                f"denoiser: expected t of shape (B,) = ({x_t.shape[0]},), got {tuple(t.shape)}."
            )
        if self.embeds_guidance and w is None and is_guided(guidance):
            w, guidance = _embedded(guidance, x_t), None
        if not is_guided(guidance):
            out, feats = self.raw(x_t, t, cond, w, features)
            return Prediction(out, x_t, t, self.path, self.kind, feats)
        if not self.has_null:
            raise ValueError(
                f"denoiser: expected no guidance (the model has no null condition), got "
                f"{guidance}. Set the method's guidance to 1."
            )
        if null is None:
            raise ValueError("denoiser: expected a null condition with guidance, got None.")
        assert guidance is not None

        if self.null_skips:
            out, feats = self.raw(x_t, t, cond, w, features)
            with self.without(self.null_skips):
                without, _ = self.raw(x_t, t, null, w, ())
            guided = self.guide(full(out), full(without), guidance)
            return Prediction(guided, x_t, t, self.path, self.kind, feats, out)

        def double(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x, x])

        x2, t2 = torch.cat([x_t, x_t]), torch.cat([t, t])
        out, feats = self.raw(x2, t2, Cond.cat([cond, null]), double(w), features)
        with_cond, without = full(out).chunk(2)
        guided = self.guide(with_cond, without, guidance)
        feats = {name: value.chunk(2)[0] for name, value in feats.items()}
        return Prediction(guided, x_t, t, self.path, self.kind, feats, with_cond)
