"""Blocks that are alike run once: what the others would hold and compute is played back.

A transformer calls dozens of blocks that differ in their numbers alone. The first of a kind is run
aside, on copies of its inputs, forward and backward; every call then gives tensors that lie as its
results did, and moves the tracker's counts as it did: the peak within, the operations, what the
graph keeps. Of one kind are blocks of the same structure (alike.py) under the same adapter, with
the same parameters trained and inputs that lie alike; in backward besides: gradients that come in
alike, the same inputs held by others too, the same parameters with a gradient already, and the same
whose gradient from elsewhere waits for this one. What only some results need goes with those.

A call that can't be told exactly so is run as it is: hooks within the block, results that are views
of inputs, inputs with values and a gradient, anything else that stays behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stepdistill.planning.alike import PLAIN, Likeness
from stepdistill.planning.fakes import Shapes, fresh
from stepdistill.planning.tracker import CostTracker
from stepdistill.roles.rolebank import RoleBank

_MOST_RESULTS = 3  # of a block, for what the graph of each choice of them keeps to be found


@dataclass(frozen=True)
class _Place:
    """Stands for the tensor of that number among a call's inputs or results."""

    number: int


class _Kept(NamedTuple):
    """By a graph: the numbers of input storages, and bytes besides."""

    inputs: tuple[int, ...]
    unfreed: int


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
    """peak: above what lived before. result: a tree of plain values and places. kept: by the graph
    of those of the differentiable results."""

    peak: int
    flops: int
    out: Shapes
    result: tuple[list[Any], Any]
    differentiable: tuple[bool, ...]
    kept: dict[tuple[int, ...], _Kept] = field(default_factory=dict)
    backward: dict[Any, _Backward] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[int, ...]:
        """Numbers of the differentiable results."""
        return tuple(i for i, d in enumerate(self.differentiable) if d)

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
        if _reaches_out((args, kwargs), inputs):
            return forward(*args, **kwargs)
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
        tensors = _Playback(call, record).results(inputs) if grad else record.out.made(self.mode)
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


def _reaches_out(given: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether a tensor that is none of the inputs has a gradient, as a padded batch, which has
    values: backward on copies of the inputs would go on through the graph that made it."""
    known = {id(one) for one in inputs}
    leaves = (one for one in tree_leaves(given) if isinstance(one, Tensor))
    return any(one.requires_grad and id(one) not in known for one in leaves)


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


def _uncounted(value: Any) -> Any:
    """A copy of a tensor with values, such as a time: who keeps the call keeps none that counts."""
    if not isinstance(value, Tensor):
        return value
    with _disable_current_modes():
        return value.detach().clone()


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
        self._given = tree_map(
            lambda x: _Place(number[id(x)]) if id(x) in number else _uncounted(x), given
        )
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
    ) -> _Kept | None:
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
        return _Kept(held, live - before)

    def gradients(
        self,
        record: _Record,
        grads: Sequence[Tensor | None],
        elsewhere: tuple[int, ...],
        waiting: tuple[int, ...],
    ) -> tuple[_Backward, list[Tensor | None]]:
        """Of the inputs and the parameters, for gradients of the differentiable results.

        Args: elsewhere: numbers of the storages the graph held that others hold too. waiting: of
            the parameters whose gradient from elsewhere waits for theirs from here; they get none,
            for what is added up lies as what waits.
        """
        given = [g for g in grads if g is not None]
        shapes, arrived = Shapes.of(given), tuple(g is not None for g in grads)
        key = (shapes, arrived, elsewhere, waiting, tuple(p.grad is None for p in self.params))
        if key not in record.backward:
            with self.replay.aside():
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
    ) -> _Backward:
        """What the backward pass takes; leaves the parameters' gradients as they were."""
        before = [param.grad for param in self.params]
        shared = [self.params[i] for i in waiting]
        probe, bank = _Probe(self.tracker, self.mode, grads, shared), self.replay.bank
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
        return _Backward(probe.peak, probe.flops, tuple(filled), probe.grads, of_params)


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


class _Playback:
    """What the graph holds of a call that is played back. waiting: numbers of the parameters whose
    gradient from elsewhere waits for theirs from here."""

    def __init__(self, call: _Call, record: _Record) -> None:
        self.call, self.record = call, record
        self.waiting: set[int] = set()
        self._alive, self._kept = record.wanted, record.kept[record.wanted]
        self._held: dict[int, list[Tensor]] = {}
        self._bytes: Tensor | None = None
        self._ended = False

    def results(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The call's, each of several with a node of its own, that goes when nothing needs it."""
        out = _Played.apply(self, *inputs, *self.call.params)  # type: ignore[no-untyped-call]
        if len(self._alive) == 1:
            return list(out)
        nodes = [_Result if d else None for d in self.record.differentiable]
        return [
            x if node is None else node.apply(self, i, x)  # type: ignore[no-untyped-call]
            for i, (node, x) in enumerate(zip(nodes, out, strict=True))
        ]

    def begin(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results; holds what the block's own graph would."""
        places = self.call.shapes.tensors
        for i in self._kept.inputs:
            self._held[i] = [t for t, place in zip(inputs, places, strict=True) if place[0] == i]
        self._hold(self._kept)
        return self.record.out.made(self.call.mode)

    def _hold(self, kept: _Kept) -> None:
        """No more than that."""
        self._kept, self._bytes = kept, None
        for i in self._held.keys() - {*kept.inputs}:
            del self._held[i]
        if kept.unfreed:
            self._bytes = fresh(self.call.mode, [kept.unfreed], torch.uint8)
            self.call.tracker.watch([self._bytes])

    def lose(self, result: int) -> None:
        """Nothing needs that result any more: what it alone kept in the graph goes.

        Not what made inputs that only it needs: joint blocks have none.
        """
        self._alive = tuple(i for i in self._alive if i != result)
        kept = self.record.kept.get(self._alive)
        if kept is not None and not self._ended:
            self._hold(kept)

    def share(self, leaf: Tensor) -> None:
        """A gradient of that parameter waits for one from here."""
        self.waiting |= {i for i, param in enumerate(self.call.params) if param is leaf}

    def end(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients; lets go of what the graph held."""
        tracker = self.call.tracker
        start, peak, elsewhere = tracker.live, tracker.peak, []
        for i in self._kept.inputs:
            live = tracker.live
            self._held.pop(i).clear()
            if tracker.live == live:
                elsewhere.append(i)
        self._bytes, self._ended = None, True
        waiting = tuple(sorted(self.waiting))
        known, made = self.call.gradients(self.record, grads, tuple(elsewhere), waiting)
        tracker.peak = max(peak, start + known.peak)
        tracker.flops += known.flops
        return made


class _Result(Function):
    """One result of a call that is played back; its node lives for as long as it is needed."""

    @staticmethod
    def forward(ctx: Any, playback: _Playback, number: int, made: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.token = _Token()
        weakref.finalize(ctx.token, playback.lose, number)
        (same,) = Shapes.of([made]).made(playback.call.mode, [made.untyped_storage()])
        return same  # no view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return (None, None, grad)


class _Token:
    """Lives with a node of the graph."""


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


def backward(loss: Tensor) -> None:
    """As loss.backward(): calls that are played back are told of the gradients that wait for
    theirs, those of parameters that other parts of the graph use, too.

    Autograd adds such gradients up as each is made, not when the block is done.
    """
    users: dict[Any, list[Any]] = {}
    todo: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = {*todo}
    while todo:
        node = todo.pop()
        for after in {edge for edge, _ in node.next_functions} - {None}:
            if hasattr(after, "variable"):
                users.setdefault(after, []).append(node)
            elif after not in seen:
                seen.add(after)
                todo.append(after)
    for leaf, nodes in users.items():
        played = [node for node in nodes if isinstance(node, _Played._backward_cls)]
        for node in nodes if played and len(nodes) > 1 else ():
            node.register_hook(partial(_arrived, leaf, node.next_functions, played))
    loss.backward()


def _arrived(
    leaf: Any, edges: Any, played: Sequence[Any], grads: Sequence[Tensor | None], _out: Any
) -> None:
    """Tells calls that are played back of a gradient of that leaf, where a node gave one."""
    if any(edge[0] is leaf and g is not None for edge, g in zip(edges, grads, strict=True)):
        for node in played:
            node.playback.share(leaf.variable)
