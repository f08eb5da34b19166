"""Blocks that are alike run once: what the others would hold and compute is played back.

A transformer calls dozens of blocks that differ in their numbers alone. The first of a kind is run
aside, on copies of its inputs, forward and backward; every call then gives tensors that lie as its
results did, and moves the tracker's counts as it did: the peak within, the operations, what the
graph keeps. Of one kind are blocks of the same structure (alike.py) under the same adapter, with
the same parameters trained and inputs that lie alike; in backward besides: gradients that come in
alike, the same inputs held by others too, and the same parameters with a gradient already.

A call that can't be told exactly so is run as it is: hooks within the block, results that are views
of inputs, anything else that stays behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function, once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stepdistill.planning.alike import PLAIN, Likeness
from stepdistill.planning.fakes import Shapes, fresh
from stepdistill.planning.tracker import CostTracker
from stepdistill.roles.rolebank import RoleBank


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor of that number among a call's inputs or results."""

    number: int


class _Backward(NamedTuple):
    """peak: above what lived as the gradients came in. filled: numbers of the inputs and
    parameters that get one; of_inputs lies over the storages that came in, where it does."""

    peak: int
    flops: int
    filled: tuple[int, ...]
    of_inputs: Shapes
    of_params: Shapes


@dataclass
class _Record:
    """peak: above what lived before. result: a tree of plain values and places. held: numbers of
    the input storages that the graph keeps, and unfreed: bytes that it keeps besides."""

    peak: int
    flops: int
    out: Shapes
    result: tuple[list[Any], Any]
    differentiable: tuple[bool, ...]
    held: tuple[int, ...] = ()
    unfreed: int = 0
    backward: dict[Any, _Backward] = field(default_factory=dict)

    def filled_with(self, tensors: Sequence[Tensor]) -> Any:
        """The block's result of those tensors."""
        leaves, spec = self.result
        return tree_unflatten(
            [tensors[one.number] if isinstance(one, _Place) else one for one in leaves], spec
        )


class Replay:
    """Args: bank: whose adapters the blocks answer with; None for networks without."""

    def __init__(
        self, tracker: CostTracker, mode: FakeTensorMode, bank: RoleBank | None = None
    ) -> None:
        self.tracker, self.mode, self.bank = tracker, mode, bank
        self._records: dict[Any, _Record | None] = {}
        self._likeness = Likeness()

    def wrap(self, blocks: Iterable[nn.Module]) -> None:
        """Play the calls of these blocks back, none of them inside another."""
        for block in blocks:
            within = [part for part in block.modules() if part is not block]
            about = (self._likeness.structure(block), tuple(block.parameters()), within)
            forward: Any = partial(self._call, about, block.forward)
            block.forward = forward

    def _call(
        self,
        about: tuple[Any, tuple[nn.Parameter, ...], list[nn.Module]],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        structure, parameters, within = about
        if any(part._forward_hooks or part._forward_pre_hooks for part in within):
            return forward(*args, **kwargs)
        inputs: list[Tensor] = []
        given = self._likeness.plain((args, kwargs), inputs)
        params = [p for p in parameters if p.requires_grad]
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*params, *inputs))
        call = _Call(self, forward, (args, kwargs), inputs, params)
        kind: Any = (structure, given, call.shapes, call.adapter, call.autocast)
        kind += (torch.is_grad_enabled(),)
        if grad:
            kind += (tuple(p.requires_grad for p in parameters), tuple(call.differentiable))
        tracker, start, flops = self.tracker, self.tracker.live, self.tracker.flops
        if grad and kind not in self._records:
            with self.aside():
                record = call.recorded()
            self._records[kind] = record if tracker.live == start else None
        elif kind not in self._records:
            peak = tracker.peak
            tracker.reset_peak()
            out = forward(*args, **kwargs)
            record = _record(out, [*inputs, *parameters], tracker.peak - start)
            if record is not None:
                record.flops = tracker.flops - flops
            exact = record is not None and tracker.live - start == record.out.nbytes
            self._records[kind] = record if exact else None
            tracker.peak = max(peak, tracker.peak)
            return out
        record = self._records[kind]
        if record is None:
            return forward(*args, **kwargs)
        tensors = (
            _Played.apply(_Playback(call, record), *inputs, *params)  # type: ignore[no-untyped-call]
            if grad
            else record.out.made(self.mode)
        )
        tracker.flops += record.flops
        tracker.peak = max(tracker.peak, start + record.peak)
        return record.filled_with(tensors)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within: the tracker's peak and operations are no part of its count."""
        peak, flops = self.tracker.peak, self.tracker.flops
        try:
            yield
        finally:
            self.tracker.peak, self.tracker.flops = peak, flops


def _record(out: Any, others: Sequence[Tensor], peak: int) -> _Record | None:
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
    result = [_Place(number[id(x)]) if isinstance(x, Tensor) else x for x in leaves]
    grads = tuple(tensor.requires_grad for tensor in tensors)
    return _Record(peak, 0, Shapes.of(tensors), (result, spec), grads)


class _Call:
    """How to run a call of a block again on copies of its inputs; holds no tensor of its graph."""

    def __init__(
        self,
        replay: Replay,
        forward: Callable[..., Any],
        given: Any,
        inputs: Sequence[Tensor],
        params: list[nn.Parameter],
    ) -> None:
        self.replay, self.tracker, self.mode = replay, replay.tracker, replay.mode
        self.forward, self.params = forward, params
        self.shapes = Shapes.of(inputs)
        self.differentiable = [t.requires_grad for t in inputs]
        number = {id(t): i for i, t in enumerate(inputs)}
        self._given = tree_map(lambda x: _Place(number[id(x)]) if id(x) in number else x, given)
        self.autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        self.adapter = None if replay.bank is None else replay.bank.active

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
            lambda x: copies[x.number] if isinstance(x, _Place) else x, self._given
        )
        return self.forward(*args, **kwargs)

    def _drop(self, copies: list[Any], storage: int) -> bool:
        """Let go of the copies in that storage; returns whether it lives on."""
        live = self.tracker.live
        for n, place in enumerate(self.shapes.tensors):
            if place[0] == storage:
                copies[n] = None
        return self.tracker.live == live

    def recorded(self) -> _Record | None:
        """What the call takes forward; None where it can't be played back."""
        tracker, copies = self.tracker, self._copies()
        before, flops = tracker.live, tracker.flops
        tracker.reset_peak()
        out = self._run(copies)
        record = _record(out, [*copies, *self.params], tracker.peak - before)
        if record is None:
            return None
        record.flops = tracker.flops - flops
        record.unfreed = tracker.live - before - record.out.nbytes
        graph = [x.grad_fn for x in tree_leaves(out) if isinstance(x, Tensor)]
        live = tracker.live
        del out
        if live - tracker.live != record.out.nbytes:
            return None  # a graph that keeps its result
        storages = range(len(self.shapes.storages))
        record.held = tuple(i for i in storages if self._drop(copies, i))
        graph.clear()
        return record

    def gradients(
        self, record: _Record, grads: Sequence[Tensor | None], elsewhere: tuple[bool, ...]
    ) -> tuple[_Backward, list[Tensor | None]]:
        """Of the inputs and the parameters, for gradients of the differentiable results.

        Args: elsewhere: of each storage the graph held, whether others hold it too.
        """
        given = [g for g in grads if g is not None]
        shapes, arrived = Shapes.of(given), tuple(g is not None for g in grads)
        key = (shapes, arrived, elsewhere, tuple(p.grad is None for p in self.params))
        if key not in record.backward:
            with self.replay.aside():
                record.backward[key] = self._backward(record, shapes, arrived, elsewhere)
        known = record.backward[key]
        storages = list({id(s): s for s in (g.untyped_storage() for g in given)}.values())
        made = iter([*known.of_inputs.made(self.mode, storages), *known.of_params.made(self.mode)])
        count = len(self.differentiable) + len(self.params)
        return known, [next(made) if i in known.filled else None for i in range(count)]

    def _backward(
        self,
        record: _Record,
        grads: Shapes,
        arrived: tuple[bool, ...],
        elsewhere: tuple[bool, ...],
    ) -> _Backward:
        """What the backward pass takes; leaves the parameters' gradients as they were."""
        before = [param.grad for param in self.params]
        probe, bank = _Probe(self.tracker, self.mode, grads), self.replay.bank
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
            end = _Finish.apply(probe, *out)  # type: ignore[no-untyped-call]
        out.clear()
        needed = {i for i, here in zip(record.held, elsewhere, strict=True) if here}
        for i in range(len(self.shapes.storages)):
            if i not in needed:
                self._drop(copies, i)
        end.backward()
        probe.ended([])
        param_grads = [
            p.grad if b is None else None for p, b in zip(self.params, before, strict=True)
        ]
        for param, grad in zip(self.params, before, strict=True):
            param.grad = grad
        wanted = [i for i, d in enumerate(self.differentiable) if d]
        filled = [wanted[i] for i in probe.filled]
        filled += [len(self.differentiable) + i for i, g in enumerate(param_grads) if g is not None]
        of_params = Shapes.of([g for g in param_grads if g is not None])
        return _Backward(probe.peak, probe.flops, tuple(filled), probe.grads, of_params)


class _Probe:
    """What lies between the gradients' coming in at a block's end and their leaving it."""

    def __init__(self, tracker: CostTracker, mode: FakeTensorMode, arriving: Shapes) -> None:
        self.tracker, self.mode, self.arriving = tracker, mode, arriving
        self.peak, self.flops = -1, 0
        self.filled: list[int] = []
        self.grads = Shapes((), ())

    def begun(self) -> list[Tensor]:
        """The gradients that come in."""
        made = self.arriving.made(self.mode)
        storages = {id(s): s for s in (g.untyped_storage() for g in made)}.values()
        self._storages = [weakref.ref(storage) for storage in storages]
        self.tracker.reset_peak()
        self._start, self._flops = self.tracker.live, self.tracker.flops
        return made

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


class _Playback:
    """What the graph holds of a call that is played back."""

    def __init__(self, call: _Call, record: _Record) -> None:
        self.call, self.record = call, record
        self.held: list[list[Tensor]] = []
        self.held_bytes: Tensor | None = None

    def begin(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results; holds what the block's own graph would."""
        places = self.call.shapes.tensors
        for i in self.record.held:
            self.held.append([t for t, place in zip(inputs, places, strict=True) if place[0] == i])
        if self.record.unfreed:
            self.held_bytes = fresh(self.call.mode, [self.record.unfreed], torch.uint8)
        return self.record.out.made(self.call.mode)

    def end(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients; lets go of what the graph held."""
        tracker = self.call.tracker
        start, peak, elsewhere = tracker.live, tracker.peak, []
        for tensors in self.held:
            live = tracker.live
            tensors.clear()
            elsewhere.append(tracker.live == live)
        self.held_bytes = None
        known, made = self.call.gradients(self.record, grads, tuple(elsewhere))
        tracker.peak = max(peak, start + known.peak)
        tracker.flops += known.flops
        return made


class _Played(Function):
    """A block's call, played back."""

    @staticmethod
    def forward(ctx: Any, playback: _Playback, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.playback = playback
        ctx.set_materialize_grads(False)
        made = playback.begin(tensors[: len(playback.call.differentiable)])
        grads = playback.record.differentiable
        ctx.mark_non_differentiable(*(t for t, d in zip(made, grads, strict=True) if not d))
        return tuple(made)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.playback.record.differentiable
        arrived = [g for g, d in zip(grads, wanted, strict=True) if d]
        return (None, *ctx.playback.end(arrived))
