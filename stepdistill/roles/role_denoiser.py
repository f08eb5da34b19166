"""RoleDenoiser: what `nets[role]` is, one role of a RoleBank as a Denoiser."""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.core.denoiser import Denoiser, Prediction
from stepdistill.core.path import NoisePath, PredictionType
from stepdistill.core.types import Cond
from stepdistill.families.causal import caching, is_causal
from stepdistill.families.end_input import told_end
from stepdistill.families.family import Family
from stepdistill.families.features import capture, chosen_blocks, leave_out


def forget_graphless_casts() -> None:
    """Drop autocast's cached low-precision weights after a call without gradients.

    Autocast keeps each trained weight's cast for its whole context. A cast made under no_grad has
    no graph, and a later forward with gradients that reused it would train nothing, silently.
    torch 2.14 was seen to guard against this itself; earlier releases are not relied on to.
    """
    if not torch.is_grad_enabled():
        torch.clear_autocast_cache()


class RoleDenoiser(Denoiser):
    """`nets[role]`: one role of a RoleBank as a Denoiser."""

    def __init__(
        self,
        family: Family,
        net: nn.Module,
        adapter: str | None,
        activate: Callable[[str | None], AbstractContextManager[None]],
        as_flow: bool,
        features: bool,
        see: Callable[[Prediction], None],
    ) -> None:
        """Args:
        net, adapter: what computes the role, and the adapter on it (None: none).
        activate: within its context that adapter is active, and no other.
        as_flow: see Role. features: whether its blocks are the teacher's, which heads read.
        see: told of every prediction.
        """
        self._see = see
        self._family, self._net, self._adapter, self._activate = family, net, adapter, activate
        self.path: NoisePath = family.path.as_flow() if as_flow else family.path
        self.kind: PredictionType = "flow" if as_flow else family.kind
        self.embeds_guidance = family.embeds_guidance
        self.has_null = family.has_null
        # Blocks are named by the teacher's architecture; heads read roles that share it.
        self._blocks = family.feature_blocks() if features else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        """See Denoiser.__call__."""
        pred = super().__call__(*args, **kwargs)
        self._see(pred)
        return pred

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """See Denoiser.guide: as the family's stock pipeline does it."""
        return self._family.guide(cond, null, guidance)

    def on(self, net: nn.Module) -> RoleDenoiser:
        """The same role computed by another network, which holds the role's weights itself."""
        other = copy.copy(self)
        other._net, other._adapter = net, None
        return other

    def under(
        self, adapter: str, activate: Callable[[str | None], AbstractContextManager[None]]
    ) -> RoleDenoiser:
        """The same network with that adapter, put on by `activate`."""
        other = copy.copy(self)
        other._adapter, other._activate = adapter, activate
        return other

    def seen_by(self, see: Callable[[Prediction], None]) -> RoleDenoiser:
        """The same, with another who is told of its predictions."""
        other = copy.copy(self)
        other._see = see
        return other

    @contextmanager
    def in_pipeline(self) -> Iterator[Any]:
        """Within: the family's stock pipeline around this role's network, adapter unmerged."""
        family = self._family
        pipeline = copy.copy(family.pipeline)
        pipeline.register_modules(**family.parts_of(self._net))
        with self._activate(self._adapter):
            yield pipeline

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw. Runs the stock network in its own dtype under this role's adapter."""
        family = self._family
        interval = None if self.end is None else t - self.end
        with self._capturing(features, cond) as feats, told_end(self._net, interval):
            out = family.forward(self._net, x_t, self.path.model_time(t), cond, w=w)
        forget_graphless_casts()
        return out, family.image_features(feats, x_t, cond)

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """See Denoiser.features. The network stops behind the last of these blocks."""
        family = self._family
        with self._capturing(names, cond, only=True) as feats:
            family.forward(self._net, x_t, self.path.model_time(t), cond)
        forget_graphless_casts()
        return family.image_features(feats, x_t, cond)

    @contextmanager
    def remembered(self) -> Iterator[Callable[[Tensor, Cond], None] | None]:
        """See Denoiser.remembered: keys and values of the chunks so far are cached."""
        if not is_causal(self._net):
            yield None
            return
        with caching(self._net) as state:

            @torch.no_grad()
            def remember(x0: Tensor, cond: Cond) -> None:
                state.keeps = True
                clean = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
                self.raw(x0, clean, cond, None, ())
                state.keeps, state.start = False, state.start + x0.shape[2]

            yield remember

    def without(self, blocks: Sequence[str]) -> AbstractContextManager[None]:
        """See Denoiser.without.

        Errors: ValueError for what is no transformer block of the family, or where a checkpointed
        backward would run the blocks after all.
        """
        known = {name: block for name, block in self._blocks.items() if block.layout == "tokens"}
        if not set(blocks) <= set(known):
            raise ValueError(
                f"skip_layers: expected transformer blocks of {self._family.name} "
                f"({', '.join(known) or 'it has none'}), got {list(blocks)}."
            )
        if torch.is_grad_enabled() and getattr(self._net, "is_gradient_checkpointing", False):
            raise ValueError(
                "skip_layers: expected a call without gradients, got one through a network with "
                "gradient_checkpointing. Turn that off."
            )
        return leave_out(self._net, {name: known[name] for name in blocks})

    @contextmanager
    def _capturing(
        self, features: Sequence[str], cond: Cond, only: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Within: the role's adapter is active, and a dict fills with these blocks' features."""
        if features and not self._blocks:
            raise ValueError(
                "student: expected features of roles with the teacher's architecture, got "
                f"{list(features)} of one with tuning.student_config. Leave that option out."
            )
        blocks = chosen_blocks(features, self._blocks) if features else {}
        with (
            self._activate(self._adapter),
            capture(self._net, blocks, only, self._family.num_calls(cond)) as feats,
        ):
            yield feats
