"""What the pretend device refuses, with file and line, what it allows, and that nothing stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.testing.pretend_device import PretendDeviceError, pretend_device


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretend_device() as found:
        yield found


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.mean()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x[0, 0] > 0 else 2,
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "copy": lambda x: torch.empty(2, 3).copy_(x),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_names_its_line(name, device) -> None:
    at = rf"{re.escape(__file__)}:{READS[name].__code__.co_firstlineno}: expected no read"
    with pytest.raises(PretendDeviceError, match=at):
        READS[name](torch.ones(2, 3, device=device))


MEETINGS: dict[str, Callable[[Tensor], object]] = {
    "add": lambda x: x + torch.ones(3),
    "linear": lambda x: F.linear(x, torch.ones(4, 3)),
    "matmul": lambda x: x @ torch.ones(3, 3),
    "where": lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
    "cat": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "indexed": lambda x: torch.ones(3)[x[:, 0].long()],
    "embedding": lambda x: F.embedding(torch.zeros(2, dtype=torch.long), x),
    "lerp": lambda x: torch._foreach_lerp_([x], [torch.ones(2, 3)], 0.5),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_two_sides_do_not_meet(name, device) -> None:
    at = rf"{re.escape(__file__)}:{MEETINGS[name].__code__.co_firstlineno}: expected tensors of one"
    with pytest.raises(PretendDeviceError, match=at):
        MEETINGS[name](torch.ones(2, 3, device=device))


def test_what_a_gpu_allows(device) -> None:
    x = torch.ones(2, 3, device=device, requires_grad=True)
    y = x * torch.tensor(2.0) + torch.ones(2, 3).to(device)  # the host's number, a copy to it
    y = y[torch.tensor([1, 0])]  # the host's indices
    y = torch.where(y > 0, y, torch.zeros((), device=device))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta
    assert float(torch.ones(3).sum()) == 3.0  # what is the host's may be read


def test_a_fault_in_backward_is_seen(device) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    with pytest.raises(PretendDeviceError, match=rf"{re.escape(__file__)}:\d+: expected no read"):
        Reads.apply(torch.ones(2, device=device, requires_grad=True)).sum().backward()


def test_a_reader_gets_ones() -> None:
    def reads(x: Tensor) -> tuple[float, bool, list[float]]:
        return float(x.sum()), bool(x.any()), x.cpu().tolist()

    with pretend_device([reads]) as device:
        x = torch.zeros(2, device=device)
        assert reads(x) == (1.0, True, [1.0, 1.0])
        with pytest.raises(PretendDeviceError):
            x.cpu()


def test_autocast_as_on_a_gpu(device) -> None:
    """Linear layers in half, norms and softmax in float32; recomputed blocks as at first."""
    layer, norm = nn.Linear(3, 3).to(device), nn.LayerNorm(3).to(device)
    x, seen = torch.ones(2, 3, device=device, requires_grad=True), []

    def block(x: Tensor) -> Tensor:
        y = layer(x)
        z = norm(y)
        seen.append((y.dtype, z.dtype, (y @ y.T).softmax(-1).dtype))
        return z.sigmoid()

    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = checkpoint(block, x, use_reentrant=False)
        with torch.autocast(device.type, enabled=False):
            assert layer(x).dtype == torch.float32
    out.float().sum().backward()
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 2
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_accelerate_takes_it_and_nothing_stays() -> None:
    before = dict(PartialState._shared_state), torch.autocast
    with pretend_device() as device:
        assert Accelerator().device == device
        weight = (layer := nn.Linear(2, 2)).weight
        assert layer.to(device).weight is weight  # as an optimiser made before holds it
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
    assert (dict(PartialState._shared_state), torch.autocast) == before
    AcceleratorState._reset_state(True)
    assert Accelerator(cpu=True).device.type == "cpu"
    with pytest.raises(RuntimeError):
        torch.autocast("meta")
