"""Which entries of a file a converter of another library uses: tensors that remember their origin.

Converters of checkpoints and LoRA files rename, cut, stack and scale tensors, and drop without a
word what they don't know. Fed with traced tensors, each of their results says what went into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__}  # an alpha becomes one
_SHAPES_ALONE = {torch.zeros_like, torch.ones_like, torch.empty_like, Tensor.new_zeros}


class Traced(Tensor):
    """A tensor and the names of the entries that it was made of.

    numbers: of all tensors traced together, the entries that were read as plain numbers.
    """

    names: frozenset[str]
    numbers: set[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Traced)]
        names = frozenset().union(*(origin(x) for x in inputs))
        numbers = next((x.numbers for x in inputs if hasattr(x, "numbers")), set())
        if func in _NUMBERS:
            numbers |= names
        if func is Tensor.__setitem__:  # the piece becomes part of the whole
            args[0].__class__ = cls
            out = args[0]
        for made in tree_leaves(out):
            if isinstance(made, Traced):
                made.names = frozenset() if func in _SHAPES_ALONE else names
                made.numbers = numbers
        return None if func is Tensor.__setitem__ else out


def traced(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each made of its own entry."""
    made, numbers = dict[str, Tensor](), set[str]()
    for name, value in tensors.items():
        one = value.as_subclass(Traced)
        one.names, one.numbers = frozenset({name}), numbers
        made[name] = one
    return made


def origin(value: Any) -> frozenset[str]:
    """The entries that went into a converter's result; none into what it made up itself."""
    names: frozenset[str] = getattr(value, "names", frozenset())
    return names


def used(given: Mapping[str, Tensor], results: Iterable[Any]) -> set[str]:
    """The entries of `traced` that went into the results, or were read as numbers on the way."""
    numbers = next((x.numbers for x in given.values() if isinstance(x, Traced)), set[str]())
    return numbers.union(*(origin(x) for x in results))
