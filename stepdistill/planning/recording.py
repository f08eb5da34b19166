"""A block's call, run aside on copies of its inputs: what it takes, holds and gives.

Forward by `Call.recorded`, backward by `Call.gradients`, once for each way in which it is met.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stepdistill.planning.alike import PLAIN
from stepdistill.planning.fakes import Shapes, fresh
from stepdistill.planning.tracker import CostTracker
from stepdistill.roles.rolebank import RoleBank

_MOST_RESULTS = 3  # of a block, for what the graph of each choice of them keeps to be found


@dataclass(frozen=True)
class Place:
    """Stands for the tensor of that number among a call's inputs or results."""

    number: int


class Kept(NamedTuple):
    """By a graph: the numbers of input storages, and bytes besides."""

    inputs: tuple[int, ...]
    unfreed: int


class Backward(NamedTuple):
    """peak: above what lived as the gradients came in. filled: numbers of the inputs and
    parameters that get one; of_inputs lies over the storages that came in, where it does."""

    peak: int
    flops: int
    filled: tuple[int, ...]
    of_inputs: Shapes
    of_params: Shapes


@dataclass
class Record:
    """peak: above what lived before. result: a tree of plain values and places. kept: by the graph
    of those of the differentiable results."""

    peak: int
    flops: int
    out: Shapes
    result: tuple[list[Any], Any]
    differentiable: tuple[bool, ...]
    kept: dict[tuple[int, ...], Kept] = field(default_factory=dict)
    backward: dict[Any, Backward] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[int, ...]:
        """Numbers of the differentiable results."""
        return tuple(i for i, d in enumerate(self.differentiable) if d)

    def filled_with(self, tensors: Sequence[Tensor]) -> Any:
        """The block's result of those tensors."""
        leaves, spec = self.result
        return tree_unflatten(
            [tensors[one.number] if isinstance(one, Place) else one for one in leaves], spec
        )


def record_of(out: Any, others: Sequence[Tensor], peak: int) -> Record | None:
    """Of a call's result; None where that can't be made again: of other values, or views."""
    leaves, spec = tree_flatten(out)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    storages = {id(one.untyped_storage()) for one in others}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not isinstance(leaf, FakeTensor) or id(leaf.untyped_storage()) in storages:
                return None
        elif type(leaf) not in PLAIN:
            return None
    number = {id(tensor): i for i, tensor in enumerate(tensors)}
    result = [Place(number[id(x)]) if isinstance(x, Tensor) else x for x in leaves]
    grads = tuple(tensor.requires_grad for tensor in tensors)
    return Record(peak, 0, Shapes.of(tensors), (result, spec), grads)


def _uncounted(value: Any) -> Any:
    """A copy of a tensor with values, such as a time: who keeps the call keeps none that counts."""
    if not isinstance(value, Tensor):
        return value
    with _disable_current_modes():
        return value.detach().clone()


class Call:
    """How to run a call of a block again on copies of its inputs; holds no tensor of its graph.

    Args: counted: the tracker, the fake tensors' mode, and the bank of adapters that it runs with.
    """

    def __init__(
        self,
        counted: tuple[CostTracker, FakeTensorMode, RoleBank | None],
        forward: Callable[..., Any],
        given: Any,
        inputs: Sequence[Tensor],
        params: list[nn.Parameter],
    ) -> None:
        self.tracker, self.mode, self.bank = counted
        self.forward, self.params = forward, params
        self.shapes = Shapes.of(inputs)
        self.differentiable = [t.requires_grad for t in inputs]
        number = {id(t): i for i, t in enumerate(inputs)}
        self._given = tree_map(
            lambda x: Place(number[id(x)]) if id(x) in number else _uncounted(x), given
        )
        self.autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        self.adapter = None if self.bank is None else self.bank.active

    def _copies(self, probe: _Probe | None = None) -> list[Any]:
        """Tensors that lie as the inputs do; those with a gradient are results of a node."""
        made = self.shapes.made(self.mode)
        wanted = [t for t, d in zip(made, self.differentiable, strict=True) if d]
        if wanted:
            leaf = torch.empty(0, requires_grad=True)
            begun = iter(_Begin.apply(probe, wanted, leaf))  # type: ignore[no-untyped-call]
            return [next(begun) if d else t for t, d in zip(made, self.differentiable, strict=True)]
        return made

    def _run(self, copies: Sequence[Tensor]) -> Any:
        args, kwargs = tree_map(
            lambda x: copies[x.number] if isinstance(x, Place) else x, self._given
        )
        return self.forward(*args, **kwargs)

    def _drop(self, copies: list[Any], storage: int) -> bool:
        """Let go of the copies in that storage; returns whether it lives on."""
        live = self.tracker.live
        for n, place in enumerate(self.shapes.tensors):
            if place[0] == storage:
                copies[n] = None
        return self.tracker.live == live

    def recorded(self) -> Record | None:
        """What the call takes forward; None where it can't be played back."""
        tracker, copies = self.tracker, self._copies()
        before, flops = tracker.live, tracker.flops
        tracker.reset_peak()
        out = self._run(copies)
        record = record_of(out, [*copies, *self.params], tracker.peak - before)
        if record is None:
            return None
        record.flops = tracker.flops - flops
        out, wanted = [x for x in tree_leaves(out) if isinstance(x, Tensor)], record.wanted
        kept = self._kept(copies, out, wanted, tracker.live - record.out.nbytes, before)
        if kept is None:
            return None
        record.kept[wanted] = kept
        for count in range(1, len(wanted) if len(wanted) <= _MOST_RESULTS else 0):
            for some in combinations(wanted, count):
                copies = self._copies()
                before = tracker.live
                out = [x for x in tree_leaves(self._run(copies)) if isinstance(x, Tensor)]
                kept = self._kept(copies, out, some, None, before)
                if kept is not None:
                    record.kept[some] = kept
        return record

    def _kept(
        self,
        copies: list[Any],
        out: list[Tensor],
        some: Sequence[int],
        left: int | None,
        before: int,
    ) -> Kept | None:
        """By the graph of some of the results, all of which, and the inputs, are let go of.

        Args: left: bytes that live then; None for whatever it is. before: as the call began.
        Returns: None where others are left: of a graph that keeps its result.
        """
        graph = [out[i].grad_fn for i in some]
        out.clear()
        live = self.tracker.live
        if left is not None and live != left:
            return None
        storages = range(len(self.shapes.storages))
        held = tuple(i for i in storages if self._drop(copies, i))
        graph.clear()
        return Kept(held, live - before)

    def gradients(
        self,
        record: Record,
        grads: Sequence[Tensor | None],
        elsewhere: tuple[int, ...],
        waiting: tuple[int, ...],
    ) -> tuple[Backward, list[Tensor | None]]:
        """Of the inputs and the parameters, for gradients of the differentiable results.

        Args: elsewhere: numbers of the storages the graph held that others hold too. waiting: of
            the parameters whose gradient from elsewhere waits for theirs from here; they get none,
            for what is added up lies as what waits.
        """
        given = [g for g in grads if g is not None]
        shapes, arrived = Shapes.of(given), tuple(g is not None for g in grads)
        key = (shapes, arrived, elsewhere, waiting, tuple(p.grad is None for p in self.params))
        if key not in record.backward:
            with self.tracker.aside():
                record.backward[key] = self._backward(shapes, arrived, elsewhere, waiting)
        known = record.backward[key]
        storages = list({id(s): s for s in (g.untyped_storage() for g in given)}.values())
        made = iter([*known.of_inputs.made(self.mode, storages), *known.of_params.made(self.mode)])
        count = len(self.differentiable) + len(self.params)
        return known, [next(made) if i in known.filled else None for i in range(count)]

    def _backward(
        self,
        grads: Shapes,
        arrived: tuple[bool, ...],
        elsewhere: tuple[int, ...],
        waiting: tuple[int, ...],
    ) -> Backward:
        """What the backward pass takes; leaves the parameters' gradients as they were."""
        before = [param.grad for param in self.params]
        shared = [self.params[i] for i in waiting]
        probe, bank = _Probe(self.tracker, self.mode, grads, shared), self.bank
        enabled, dtype = self.autocast
        with (
            torch.enable_grad(),
            nullcontext() if bank is None else bank.use(self.adapter),
            torch.autocast("cpu", dtype, enabled, cache_enabled=False),
        ):
            copies = self._copies(probe)
            out = tree_leaves(self._run(copies))
            out = [x for x in out if isinstance(x, Tensor) and x.requires_grad]
            out = [x for x, here in zip(out, arrived, strict=True) if here]
            end = _Finish.apply(probe, *out, *shared)  # type: ignore[no-untyped-call]
        out.clear()
        for i in range(len(self.shapes.storages)):
            if i not in elsewhere:
                self._drop(copies, i)
        end.backward()
        probe.ended([])
        param_grads = [
            p.grad if b is None and i not in waiting else None
            for i, (p, b) in enumerate(zip(self.params, before, strict=True))
        ]
        for param, grad in zip(self.params, before, strict=True):
            param.grad = grad
        wanted = [i for i, d in enumerate(self.differentiable) if d]
        filled = [wanted[i] for i in probe.filled]
        filled += [len(self.differentiable) + i for i, g in enumerate(param_grads) if g is not None]
        of_params = Shapes.of([g for g in param_grads if g is not None])
        return Backward(probe.peak, probe.flops, tuple(filled), probe.grads, of_params)


class _Probe:
    """What lies between the gradients' coming in at a block's end and their leaving it."""

    def __init__(
        self,
        tracker: CostTracker,
        mode: FakeTensorMode,
        arriving: Shapes,
        shared: Sequence[nn.Parameter],
    ) -> None:
        self.tracker, self.mode, self.arriving, self.shared = tracker, mode, arriving, shared
        self.peak, self.flops = -1, 0
        self.filled: list[int] = []
        self.grads = Shapes((), ())

    def begun(self) -> list[Tensor]:
        """The gradients that come in, and those that wait."""
        made = self.arriving.made(self.mode)
        storages = {id(s): s for s in (g.untyped_storage() for g in made)}.values()
        self._storages = [weakref.ref(storage) for storage in storages]
        waiting = [fresh(self.mode, param.shape, param.dtype) for param in self.shared]
        self.tracker.reset_peak()
        self._start, self._flops = self.tracker.live, self.tracker.flops
        return made + waiting

    def ended(self, grads: Sequence[Tensor | None]) -> None:
        """Counts, the first time."""
        if self.peak < 0:
            self.peak = self.tracker.peak - self._start
            self.flops = self.tracker.flops - self._flops
            self.filled = [i for i, g in enumerate(grads) if g is not None]
            given = [storage() for storage in self._storages]
            self.grads = Shapes.of([g for g in grads if g is not None], given)


class _Begin(Function):
    """The block's inputs, as results of a node that sees their gradients."""

    @staticmethod
    def forward(ctx: Any, probe: _Probe | None, tensors: list[Tensor], _leaf: Tensor) -> Any:
        ctx.probe = probe
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.probe.ended(grads)
        return (None, None, None)


class _Finish(Function):
    """A number whose backward pass sends the block's results gradients."""

    @staticmethod
    def forward(ctx: Any, probe: _Probe, *_out: Tensor) -> Tensor:
        ctx.probe = probe
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.probe.begun())
