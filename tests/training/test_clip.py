"""Gradients are clipped as torch clips them; of shards by test_distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.training.optim import _clip


@pytest.mark.parametrize("limit", [0.1, 1e3])
def test_it_is_torch_s_own_bit_for_bit(limit) -> None:
    pair = [nn.Linear(3, 4), nn.Linear(3, 4)]
    for net in pair:
        for k, param in enumerate(net.parameters()):
            param.grad = torch.full_like(param, 0.3 + k)
    norm = _clip(dict(pair[0].named_parameters()), limit)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(pair[1].parameters(), limit))
    for mine, torchs in zip(*(net.parameters() for net in pair), strict=True):
        assert torch.equal(mine.grad, torchs.grad)


def test_a_role_without_gradients_has_norm_zero() -> None:
    assert float(_clip(dict(nn.Linear(3, 4).named_parameters()), 1.0)) == 0.0
