"""A call that was recorded, played back: tensors that lie as its results did, a graph that holds
what its own would, and lets go of it when its own would.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from stepdistill.planning.fakes import Shapes, fresh
from stepdistill.planning.recording import Call, Kept, Record


class Playback:
    """What the graph holds of a call that is played back. waiting: numbers of the parameters whose
    gradient from elsewhere waits for theirs from here."""

    def __init__(self, call: Call, record: Record) -> None:
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

    def _hold(self, kept: Kept) -> None:
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
    def forward(ctx: Any, playback: Playback, number: int, made: Tensor) -> Tensor:
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
    def forward(ctx: Any, playback: Playback, *tensors: Tensor) -> tuple[Tensor, ...]:
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
