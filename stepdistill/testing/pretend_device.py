"""A pretend accelerator: torch's meta device under the rules of a real one, on any machine.

What is on it has shapes and dtypes but no values, so a whole run costs next to nothing: weights,
batch, losses, backward, optimiser, averages. What would fail on a GPU, or wait for it, fails here:

    with pretend_device(readers=(RunLog.write, Validator.run, Trainer.save)) as device:
        trainer = Trainer(...)  # Accelerate gives it this device
        trainer.train()

meta alone forgives much: it multiplies its tensors by the host's, and knows no autocast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
# A device hands these to the host, which waits for all that it was given to do.
_READS = {
    *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero),
    *(_aten.masked_select, _aten.bincount, _aten._unique2, _aten.unique_dim),
    *(_aten.unique_consecutive,),
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_JOINS = {_aten.cat, _aten.stack}  # which take no number of the host's either
# What autocast runs in half precision, and what in float32 (torch.amp's lists).
_HALF = {
    *(F.linear, F.bilinear, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm),
}
_SINGLE = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.softplus),
    *(torch.softmax, torch.log_softmax, torch.norm, torch.cumsum, torch.pow, torch.exp, torch.log),
    *(Tensor.softmax, Tensor.norm, Tensor.cumsum, Tensor.pow, Tensor.__pow__, Tensor.exp),
    *(Tensor.log, Tensor.rsqrt, torch.rsqrt, F.cosine_similarity),
}


class PretendDeviceError(RuntimeError):
    """What a real device would refuse, or wait for; it names file and line."""


@contextmanager
def pretend_device(readers: Sequence[Callable[..., Any]] = ()) -> Iterator[torch.device]:
    """Within: Accelerate's device is the pretend one, and its rules hold; yields it.

    Tensors of the two sides meet in no operation (but numbers of no dimension, and the host's
    indices of a device's tensor, as CUDA allows); nothing is read or copied back; autocast works.

    Args: readers: functions that may read, themselves or through what they call: they get ones.
    Errors: PretendDeviceError within, with file and line.
    """
    states = (PartialState, AcceleratorState)
    before = [dict(state._shared_state) for state in states]
    device = torch.device("meta")
    codes = frozenset(reader.__code__ for reader in readers)

    def restore(values: Sequence[dict[str, Any]]) -> None:
        for state, own in zip(states, values, strict=True):
            state._shared_state.clear()
            state._shared_state.update(own)

    # Moved to a device, a parameter stays the same object; to meta, by this switch alone.
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    restore(({}, {}))
    try:
        with (
            patch.object(PartialState, "default_device", device),
            patch.object(torch, "autocast", _AutocastOfMeta),
            patch.object(torch.amp, "autocast", _AutocastOfMeta),
            patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
            _Rules(codes),
            _Autocast(codes),
        ):
            yield device
    finally:
        restore(before)
        torch.__future__.set_swap_module_params_on_conversion(swapped)


class _AutocastOfMeta(torch.autocast):
    """torch's, which refuses the meta device: there as on the CPU, and `_Autocast` does the casts.

    Backward knows no mode of the forward: blocks recomputed in it bring theirs.
    """

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    def __enter__(self) -> Any:
        self._mode = nullcontext() if _len_torch_function_stack() else _Autocast(frozenset())
        self._mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        self._mode.__exit__(*error)
        return result


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _refuse(rule: str, got: str, advice: str) -> PretendDeviceError:
    """The error, at the innermost line that is neither torch's nor this file's."""
    outside = (f for f in _frames() if not f.f_globals.get("__name__", "").startswith("torch."))
    where = next(f for f in outside if f.f_code.co_filename != __file__)
    at = f"{where.f_code.co_filename}:{where.f_lineno}"
    return PretendDeviceError(f"{at}: expected {rule}, got {got}. {advice}")


class _Rules(TorchDispatchMode):
    """Which operations a device takes, and from which side."""

    def __init__(self, readers: frozenset[CodeType]) -> None:
        super().__init__()
        self._readers = readers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        packet, first = func.overloadpacket, args[0]
        if packet is _aten._to_copy or packet is _aten.copy_:
            to_host = (
                not first.is_meta
                if packet is _aten.copy_
                else "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"
            )
            if not to_host:
                return func(*args, **kwargs)
            self._may_read(f"a copy of {_told(args[-1])} to the CPU")
            like = first if packet is _aten.copy_ else torch.empty(first.shape, device="cpu")
            return like.fill_(1).to(kwargs.get("dtype") or first.dtype)
        if packet in _INDEXING and first.is_meta:
            masks = [x for x in tensors[1:] if x.is_meta and x.dtype is torch.bool]
            if masks:
                self._may_read(f"a mask {_told(masks[0])} as an index (its number of rows)")
        elif any(not x.is_meta and (x.ndim or packet in _JOINS) for x in tensors):
            told = ", ".join(_told(x) for x in tensors[:6])
            raise _refuse("tensors of one device", f"{func} of {told}", "Move what the run made.")
        elif packet in _READS or _unknown_length(packet, args, kwargs):
            self._may_read(f"{func} of {_told(first)}")
            return _answer(packet, first)
        return func(*args, **kwargs)

    def _may_read(self, what: str) -> None:
        if not any(frame.f_code in self._readers for frame in _frames()):
            advice = "It waits for the device at every step: keep the value there."
            raise _refuse("no read of the device", what, advice)


class _Autocast(TorchFunctionMode):
    """Autocast of the meta device's tensors, as the CPU's is set; and their way to NumPy."""

    def __init__(self, readers: frozenset[CodeType]) -> None:
        super().__init__()
        self._rules = _Rules(readers)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        half, single = func in _HALF, func in _SINGLE
        if (half or single) and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu") if half else torch.float32

            def cast(x: Any) -> Any:
                of_it = isinstance(x, Tensor) and x.is_meta and x.is_floating_point()
                return x.to(dtype) if of_it and x.dtype is not torch.float64 else x

            args, kwargs = tree_map(cast, (args, kwargs))
        elif func in (Tensor.numpy, Tensor.__array__, Tensor.tolist) and args[0].is_meta:
            self._rules._may_read(f"{_told(args[0])} as values")
            args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        return func(*args, **kwargs)


def _told(x: Any) -> str:
    """A tensor by its side and shape."""
    return f"{'device' if x.is_meta else 'CPU'} {tuple(x.shape)} {x.dtype}".replace("torch.", "")


def _unknown_length(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it repeats rows by numbers that are on the device."""
    return packet is _aten.repeat_interleave and kwargs.get("output_size") is None


def _answer(packet: Any, read: Tensor) -> Any:
    """What a permitted reader gets: the number one, true, or no rows."""
    if packet is _aten._local_scalar_dense:
        return torch.ones((), dtype=read.dtype, device="cpu").item()
    if packet in (_aten.is_nonzero, _aten.equal):
        return True
    return torch.empty((0, read.ndim), dtype=torch.int64, device="meta")
