"""What makes blocks and their calls alike: all that they are and are told, but for the numbers.

Both are made into values that can be compared and hashed; what can't be stands for itself alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (
    *(bool, int, float, str, type(None)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
# No part of a block's structure: a module's bookkeeping, its path in peft's layers, and its number
# among its like, by which a cache knows it (and what a cache keeps is no block's to play back).
_LEFT_OUT = {*vars(nn.Module()), "target_name", "layer_idx", "layer_id"} - {"training"}


class Likeness:
    """Of the blocks and calls that it has seen; ids stand for objects, which are kept alive, and
    numbers for tensors with values, such as a mask of words, which are not: their bytes count."""

    def __init__(self) -> None:
        self._alive: list[Any] = []
        self._numbers = count()
        self._objects: dict[int, Any] = {}

    def structure(self, block: nn.Module) -> Any:
        """What makes blocks alike but for the numbers in them."""
        parts = []
        for name, module in block.named_modules():
            facts = {k: v for k, v in vars(module).items() if module is not block or k != "forward"}
            parts.append((name, type(module), self.plain(facts, None)))
        tensors = (*block.named_parameters(), *block.named_buffers())
        return (tuple(parts), tuple((n, t.shape, t.stride(), t.dtype) for n, t in tensors))

    def plain(self, value: Any, inputs: list[Tensor] | None) -> Any:
        """The value, hashable; what can't be compared stands for itself alone.

        Args: inputs: gets the fake tensors in it; None where it is part of a structure.
        """
        kind = type(value)
        if kind in PLAIN:
            return (kind, value)
        if isinstance(value, FakeTensor):
            if inputs is None:
                return (kind, value.shape, value.stride(), value.dtype)
            inputs.append(value)
            return kind
        if isinstance(value, Mapping):
            items = ((n, x) for n, x in value.items() if inputs is not None or n not in _LEFT_OUT)
            return (kind, *((name, self.plain(one, inputs)) for name, one in items))
        if kind in (tuple, list):
            return (kind, *(self.plain(one, inputs) for one in value))
        if inputs is not None and isinstance(value, Tensor):
            if id(value) not in self._objects:
                self._objects[id(value)] = (kind, next(self._numbers))
                weakref.finalize(value, self._objects.pop, id(value), None)
            return self._objects[id(value)]
        if id(value) not in self._objects:
            self._alive.append(value)
            self._objects[id(value)] = (kind, id(value))
            if inputs is None and not _is_code(value) and hasattr(value, "__dict__"):
                self._objects[id(value)] = (kind, self.plain(vars(value), None))
        return self._objects[id(value)]


def _is_code(value: Any) -> bool:
    """Whether it is a function, a method, a class or a module, or a tensor of numbers."""
    return isinstance(value, type | partial | nn.Module | Tensor) or hasattr(value, "__name__")
