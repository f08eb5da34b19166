"""Trajectory methods whose jumps end at any grid time: how their students answer, and are sampled.

G(x_t, t, s) is the deterministic step from t to s by the network's own x0, so G(x, t, t) = x. A
network that sees (x_t, t) alone has one x0 for all ends (TCD's parameterisation, which stock
pipelines call); a full student may be told s, and then can be the trajectory itself (CTM's).
Sources: Kim et al. 2023 (CTM), arXiv:2310.02279, Eq. 3-4; Zheng et al. 2024 (TCD),
arXiv:2402.19159, Sec. 4.1.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Role, Setting
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Cond
from stepdistill.methods.grid import warn_end_is_told
from stepdistill.methods.trajectory import TrajectoryMethod
from stepdistill.methods.trajectory_config import AnyEndConfig

E = TypeVar("E", bound=AnyEndConfig)


class Staying(Denoiser):
    """G(x, t, t) of a network that is told its end: its denoiser."""

    def __init__(self, net: Denoiser) -> None:
        self.net, self.path, self.kind = net, net.path, net.kind

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw."""
        return self.net(x_t, t, cond, w=w, features=features, s=t).raw, {}


class AnyEnd(TrajectoryMethod[E]):
    """Base of tscd and ctm."""

    def __init__(self, config: E, setting: Setting) -> None:
        super().__init__(config, setting)
        if config.end_input:
            warn_end_is_told("end_input", "end_input: false")

    def roles(self) -> dict[str, Role]:
        roles, extra = super().roles(), ("s",) if self.config.end_input else ()
        for name in {"student", "target"} & set(roles):
            roles[name] = replace(roles[name], extra_inputs=extra)
        return roles

    def draw_end(self, ctx: Ctx, index: Tensor, k: int) -> Tensor:
        return self.segments.draw_end(ctx.rand(len(index)), index, k)

    def end_input(self, end: Tensor) -> Tensor | None:
        """See TrajectoryMethod.end_input."""
        return end if self.config.end_input else None

    def spec(self, k: int, num_steps: int | None) -> SamplerSpec:
        """The sampler that stops at every edge of k segments, in the config's steps where none are
        asked for, and in k where those would cross an edge.

        Errors: ValueError for a num_steps that would.
        """
        config = self.config
        default_steps = config.num_steps or k
        default_steps = default_steps if default_steps % k == 0 else k
        return SamplerSpec(
            self.segments.visit(default_steps if num_steps is None else num_steps, k),
            config.sampler,
            trained_times=tuple(self.grid.starts.flip(0).tolist()),
            guidance=config.inference_guidance,
            gamma=config.gamma if config.sampler == "tcd" else 0.0,
            tells_end=config.end_input,
        )
