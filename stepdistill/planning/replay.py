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

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from stepdistill.planning.alike import Likeness
from stepdistill.planning.playback import Playback
from stepdistill.planning.recording import Call, Record, record_of
from stepdistill.planning.tracker import CostTracker
from stepdistill.roles.rolebank import RoleBank


class Replay:
    """Args: bank: whose adapters the blocks answer with; None for networks without."""

    def __init__(
        self, tracker: CostTracker, mode: FakeTensorMode, bank: RoleBank | None = None
    ) -> None:
        self.tracker, self.mode, self.bank = tracker, mode, bank
        self._records: dict[Any, Record | None] = {}
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
        call = Call((self.tracker, self.mode, self.bank), forward, (args, kwargs), inputs, params)
        kind: Any = (structure, given, call.shapes, call.adapter, call.autocast)
        kind += (torch.is_grad_enabled(),)
        if grad:
            kind += (tuple(p.requires_grad for p in parameters), tuple(call.differentiable))
        tracker, start, flops = self.tracker, self.tracker.live, self.tracker.flops
        if grad and kind not in self._records:
            with self.tracker.aside():
                record = call.recorded()
            self._records[kind] = record if tracker.live == start else None
        elif kind not in self._records:
            peak = tracker.peak
            tracker.reset_peak()
            out = forward(*args, **kwargs)
            record = record_of(out, [*inputs, *parameters], tracker.peak - start)
            if record is not None:
                record.flops = tracker.flops - flops
            exact = record is not None and tracker.live - start == record.out.nbytes
            self._records[kind] = record if exact else None
            tracker.peak = max(peak, tracker.peak)
            return out
        record = self._records[kind]
        if record is None:
            return forward(*args, **kwargs)
        tensors = Playback(call, record).results(inputs) if grad else record.out.made(self.mode)
        tracker.flops += record.flops
        tracker.peak = max(tracker.peak, start + record.peak)
        return record.filled_with(tensors)


def _reaches_out(given: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether a tensor that is none of the inputs has a gradient, as a padded batch, which has
    values: backward on copies of the inputs would go on through the graph that made it."""
    known = {id(one) for one in inputs}
    leaves = (one for one in tree_leaves(given) if isinstance(one, Tensor))
    return any(one.requires_grad and id(one) not in known for one in leaves)
