"""Sizes of what FSDP2 gathers, against counts by hand on tiny networks."""

from __future__ import annotations

import pytest
from torch import nn

from stepdistill.planning.shards import gathered_bytes


class Net(nn.Module):
    """Two entries of 4 x 4 + 4 numbers, one with a named block of 8 x 8 + 8 in it, and a rest."""

    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Linear(2, 2, bias=False)
        self.entries = nn.ModuleList([nn.Linear(4, 4), Outer()])


class Inner(nn.Linear):
    pass


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.inner = nn.Linear(4, 4), Inner(8, 8)


def test_a_block_inside_another_is_gathered_on_top_of_it() -> None:
    kept, most = gathered_bytes([Net(), Net()])
    assert kept == 2 * 4 * 4  # float32, the rest of both
    assert most == (20 + 72) * 4


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_little_stays_gathered(make_family, name) -> None:
    net = make_family(name).net
    total = sum(p.numel() * p.element_size() for p in net.parameters())
    kept, most = gathered_bytes([net])
    assert 0 < most < total
    assert kept + most <= total
