"""RoleDenoiser: what `nets[role]` is, one role of a RoleBank as a Denoiser."""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath, NoisePath, PredictionType
from stepdistill.core.types import Cond
from stepdistill.models.features import capture, chosen_blocks

if TYPE_CHECKING:
    from stepdistill.models.rolebank import RoleBank


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

    def __init__(self, bank: RoleBank, role: str) -> None:
        self._bank = bank
        self._net: nn.Module = bank.nets[bank._net_of[role]]
        self._adapter = bank._adapter_of[role]
        family = bank.family
        as_flow = bank._origin(role).as_flow
        self.path: NoisePath = FlowPath() if as_flow else family.path
        self.kind: PredictionType = "flow" if as_flow else family.kind
        self.embeds_guidance = family.embeds_guidance
        self.has_null = family.has_null
        # Blocks are named by the teacher's architecture; heads read roles that share it.
        other = bank.tuning.student_changes is not None and bank.is_student(role)
        self._blocks = {} if other else family.feature_blocks()

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """See Denoiser.guide: as the family's stock pipeline does it."""
        return self._bank.family.guide(cond, null, guidance)

    def on(self, net: nn.Module) -> RoleDenoiser:
        """The same role computed by another network, which holds the role's weights itself."""
        other = copy.copy(self)
        other._net, other._adapter = net, None
        return other

    @contextmanager
    def in_pipeline(self) -> Iterator[Any]:
        """Within: the family's stock pipeline around this role's network, adapter unmerged."""
        family = self._bank.family
        pipeline = copy.copy(family.pipeline)
        pipeline.register_modules(**{family.net_name: self._net})
        with self._bank.use(self._adapter):
            yield pipeline

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        s: Tensor | None,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw. Runs the stock network in its own dtype under this role's adapter."""
        family = self._bank.family
        with self._capturing(features) as feats:
            out = family.forward(self._net, x_t, self.path.model_time(t), cond, s=s, w=w)
        forget_graphless_casts()
        return out, family.image_features(feats, x_t, cond)

    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """See Denoiser.features. The network stops behind the last of these blocks."""
        family = self._bank.family
        with self._capturing(names, only=True) as feats:
            family.forward(self._net, x_t, self.path.model_time(t), cond, s=None, w=None)
        forget_graphless_casts()
        return family.image_features(feats, x_t, cond)

    @contextmanager
    def _capturing(
        self, features: Sequence[str], only: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Within: the role's adapter is active, and a dict fills with these blocks' features."""
        if features and not self._blocks:
            raise ValueError(
                "student: expected features of roles with the teacher's architecture, got "
                f"{list(features)} of one with tuning.student_config. Leave that option out."
            )
        blocks = chosen_blocks(features, self._blocks) if features else {}
        with self._bank.use(self._adapter), capture(self._net, blocks, only) as feats:
            yield feats
