"""A causal network that follows a clean past."""

from __future__ import annotations

import torch

from stepdistill.core.causal import Following
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Cond


class Frames:
    """Answers each frame with its time, and remembers what it saw."""

    path, kind, has_null = FlowPath(), "flow", True

    def raw(self, x_t, t, cond, w, features):
        self.seen = x_t
        return t[:, None, :, None, None].expand_as(x_t), {}


def test_the_past_is_clean_and_only_what_follows_is_answered() -> None:
    net, past = Frames(), torch.randn(2, 3, 2, 4, 4)
    x_t, t = (
        torch.randn(4, 3, 5, 4, 4),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
    )  # guided: twice the rows
    made, _ = Following(net, past).raw(x_t, t, Cond({}), None, ())
    assert torch.equal(net.seen, torch.cat([torch.cat([past, past]), x_t], dim=2))
    assert torch.equal(made, t[:, None, None, None, None].expand_as(x_t))
