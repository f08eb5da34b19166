"""CostTracker: bytes alive, their peak, and floating-point operations of everything run within.

Fake tensors have storages of a known size that are never allocated, so whole iterations of large
models run in seconds; what autograd saves, checkpointing recomputes and the temporaries of each
operation live and die as they would on a device. An operation on tensors that lie as those of an
earlier one is not worked out again: its results lie as they did then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from stepdistill.planning.fakes import Shapes

_DEVICE: Any = torch.ops.prim.device.default
_UNKNOWN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


def _numbers(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """Row numbers of a real mask: by a mask a fake tensor gives an unknown count of rows."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True)


class CostTracker(TorchDispatchMode):
    """Within: counts. live, peak in bytes; flops a multiply-add counting as two.

    remember: whether operations are worked out once a shape.
    """

    def __init__(self, remember: bool = True) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()
        self._remember = remember
        self._results: dict[Any, _Result] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Start a new peak from what lives now."""
        self.peak = self.live

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within: peak and operations are no part of the count."""
        peak, flops = self.peak, self.flops
        try:
            yield
        finally:
            self.peak, self.flops = peak, flops

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        given: list[FakeTensor] = []
        key = None
        if self._remember and not any(tag in func.tags for tag in _UNKNOWN):
            described = _described((args, kwargs or {}), given)
            key = (func, described) if described is not None and given else None
        result = self._results.get(key) if key is not None else None
        if result is not None:
            self.flops += result.flops
            out = result.again(given)
        else:
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], [plain for index in args[1] for plain in _numbers(index)])
            out = func(*args, **(kwargs or {}))
            count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            if key is not None and (result := _Result.of(out, given, flops)) is not None:
                self._results[key] = result
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out


def _described(value: Any, given: list[FakeTensor]) -> Any:
    """What an operation's result depends on, hashable; None where it may depend on numbers.

    Fake tensors are appended to `given`.
    """
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.dtype.is_complex:
            return None
        given.append(value)
        return (value.shape, value.stride(), value.storage_offset(), value.dtype)
    if kind in (tuple, list, dict):
        entries = value.items() if kind is dict else value
        parts = [_described(entry, given) for entry in entries]
        return None if None in parts else (kind, *parts)
    if value is None or kind in (
        *(bool, int, float, str),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    ):
        return (kind, value)
    return None


class _Result:
    """What an operation gave: given tensors themselves (in place), or tensors that lie so."""

    def __init__(self, sequence: type | None, given: list[int | None], made: Shapes, flops: int):
        """sequence: tuple or list of several, None of one. given: of each, which one it is."""
        self.sequence, self.given, self.made, self.flops = sequence, given, made, flops

    @classmethod
    def of(cls, out: Any, given: list[FakeTensor], flops: int) -> _Result | None:
        """None where some of it is no fake tensor, or a number is known of it."""
        leaves = out if isinstance(out, tuple | list) else (out,)
        for leaf in leaves:
            if type(leaf) is not FakeTensor or leaf.constant is not None:
                return None
            if leaf.fake_device.type != "cpu" or leaf.dtype.is_complex:
                return None
        place: dict[int, int] = {}
        for i, tensor in enumerate(given):  # what an operation changes or views, it is given first
            place.setdefault(id(tensor), i)
        same = [place.get(id(leaf)) for leaf in leaves]
        others = [leaf for leaf, i in zip(leaves, same, strict=True) if i is None]
        shapes = Shapes.of(others, [tensor.untyped_storage() for tensor in given])
        return cls(type(out) if isinstance(out, tuple | list) else None, same, shapes, flops)

    def again(self, given: list[FakeTensor]) -> Any:
        """The same of other tensors that lie alike."""
        mode = given[0].fake_mode
        made: Iterator[Tensor] = iter(())
        if self.made.tensors:
            made = iter(self.made.made(mode, [tensor.untyped_storage() for tensor in given]))
        out = [next(made) if i is None else given[i] for i in self.given]
        return out[0] if self.sequence is None else self.sequence(out)
