"""The fake and its head: what their losses read, and what the head's costs."""

from __future__ import annotations

import pytest
import torch
from support.score import BSZ, VP, LinearHead, Net, NetDenoiser, batch_of, fake_loss, make
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.methods.rollout import Sample
from stepdistill.testing.analytic import AnalyticNets


def test_phases_read_images_only_where_their_loss_does() -> None:
    def reads(**options: object) -> list[tuple[bool, bool]]:
        return [(p.reads_x0, p.reads_real) for p in make(VP, **options).phases(0)]

    assert reads() == [(False, False)] * 2
    assert reads(rollout="data") == [(True, False)] * 2
    assert reads(gan={"weight_g": 1e-3}) == [(False, False), (False, True)]


@pytest.mark.parametrize("kind", ["approximate", "exact"])
def test_r1_without_a_weight_costs_nothing(kind: str) -> None:
    graphs = []

    class Watched(NetDenoiser):
        def raw(self, x_t: Tensor, *rest: object) -> tuple[Tensor, dict[str, Tensor]]:
            graphs.append(x_t.requires_grad)
            return super().raw(x_t, *rest)  # type: ignore[arg-type]

    nets = AnalyticNets({"fake": Watched(VP, Net(0))}, {"disc": LinearHead()})
    ctx = Ctx(carry={"sample": Sample(torch.zeros(BSZ, 2), batch_of().cond)})
    method = make(VP, gan={"weight_g": 1.0, "r1": kind})
    assert "r1" not in fake_loss(method, nets, batch_of(x0=torch.ones(BSZ, 2)), ctx).logs
    assert graphs == [False] * 3  # the fake's own loss, the head's on fake and on real samples
