"""A causal network that follows a clean past, and the sampler that makes chunk after chunk."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from stepdistill.core.causal import Following
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
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


class Sums(Denoiser):
    """x0 of a frame is the sum of all frames up to it: it tells what it saw, in order."""

    path, kind = FlowPath(), "x0"

    def __init__(self) -> None:
        self.frames: list[int] = []  # that each call saw
        self.known: Tensor | None = None  # the sum of what it remembers

    def raw(self, x_t, t, cond, w, features):
        self.frames.append(x_t.shape[2])
        out = x_t.cumsum(2)
        return (out if self.known is None else out + self.known), {}


class Remembers(Sums):
    """The same, which sees no frame twice."""

    @contextmanager
    def remembered(self):
        def remember(x0: Tensor, cond: Cond) -> None:
            seen = x0.sum(2, keepdim=True)
            self.known = seen if self.known is None else self.known + seen

        yield remember


def by_hand(noise: Tensor, fresh: Tensor | None, chunk: int) -> Tensor:
    """One step from noise, or two with this fresh noise at 0.6 between them."""
    made = noise[:, :, :0]
    for start in range(0, noise.shape[2], chunk):
        part = slice(start, start + chunk)
        past = made.sum(2, keepdim=True)
        x0 = past + noise[:, :, part].cumsum(2)
        if fresh is not None:
            x0 = past + (0.4 * x0 + 0.6 * fresh[:, :, part]).cumsum(2)
        made = torch.cat([made, x0], dim=2)
    return made


@pytest.mark.parametrize("kind", [Sums, Remembers])
@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.6)])
@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_each_chunk_follows_those_before_it(kind, times, chunk) -> None:
    generator = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 2, 3, 6, 1, 1, generator=generator, dtype=torch.float64)
    net, two = kind(), len(times) == 2
    drawn = {"fresh_noise": lambda _: fresh} if two else {}
    made = sample_x0(net, SamplerSpec(times, chunk=chunk), noise, Cond({}), **drawn)
    torch.testing.assert_close(made, by_hand(noise, fresh if two else None, chunk))
    past = [0 if kind is Remembers else start for start in range(0, 6, chunk)]
    assert net.frames == [n + chunk for n in past for _ in times]
    if kind is Remembers:  # all but the last chunk
        before = made[:, :, : 6 - chunk].sum(2, keepdim=True)
        assert net.known is None if chunk == 6 else torch.allclose(net.known, before)


@pytest.mark.parametrize(("told", "guidance", "remembers"), [(2.0, None, False), (2.0, 1.0, True)])
def test_a_guided_chunk_is_told_the_past_anew(told, guidance, remembers) -> None:
    """A null pass has another past; guidance given goes before the sampler's."""
    noise, net = torch.ones(1, 3, 4, 1, 1), Remembers()
    sample_x0(net, SamplerSpec((1.0,), chunk=2, guidance=told), noise, Cond({}), Cond({}), guidance)
    assert net.frames == ([2, 2] if remembers else [2, 4])
    assert (net.known is not None) == remembers


def test_chunks_that_need_fresh_noise_ask_for_it() -> None:
    spec = SamplerSpec((1.0, 0.6), chunk=2)
    with pytest.raises(ValueError, match="expected fresh_noise with kind 'renoise'"):
        sample_x0(Sums(), spec, torch.ones(1, 3, 4, 1, 1), Cond({}))
