"""Gradient checkpointing of stock networks: blocks that recompute themselves, whoever calls them.

Diffusers' networks call their blocks by another line where they checkpoint, and that line can leave
an argument out: in 0.42, Chroma's single blocks lose the attention mask, so that outputs and
gradients are another network's, silently. Here a block's own `forward` is wrapped, which gets what
it always gets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def no_contexts() -> Callable[[], Contexts]:
    """Of networks that answer alike whoever asks."""
    return lambda: (nullcontext(), nullcontext())


def checkpointed_blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks that recompute: entries of the module lists of a network and of those of its parts
    that Diffusers marks as able to checkpoint, but for entries with such parts of their own (and
    for None, which stands for an attention that a VAE does without).

    Those that Diffusers recomputes, and a UNet's resampling layers.
    """
    holders = [net, *(m for m in net.modules() if m is not net and _marked(m))]
    return [
        block
        for holder in holders
        for entries in holder.children()
        if isinstance(entries, nn.ModuleList)
        for block in entries
        if block is not None and not any(_marked(part) for part in block.modules())
    ]


def _marked(module: nn.Module) -> bool:
    return hasattr(module, "gradient_checkpointing")


def checkpoint_blocks(net: nn.Module, contexts: Callable[[], Callable[[], Contexts]]) -> None:
    """Recompute the activations of the network's blocks in backward.

    Args: contexts: called at each block's forward; gives checkpoint's context_fn.
    Errors: ValueError for a network without such blocks; in backward, torch's RuntimeError for a
        block whose inputs did not stay as they were.
    """
    blocks = checkpointed_blocks(net)
    if not blocks:
        raise ValueError(
            f"gradient_checkpointing: expected a network of blocks, got {type(net).__name__}, "
            "which has none. Pass --no-gradient_checkpointing."
        )
    for block in blocks:
        if getattr(block.forward, "func", None) is _recomputed:
            continue  # an autoencoder that another run has had
        # A partial of a bound method: a deep copy of the network runs its own weights.
        block.forward = partial(_recomputed, block.forward, contexts)  # type: ignore[method-assign]


def uncheckpoint_blocks(net: nn.Module) -> None:
    """Undo `checkpoint_blocks`."""
    for block in checkpointed_blocks(net):
        wrapped: Any = block.forward
        block.forward = wrapped.args[0]  # type: ignore[method-assign]


def _recomputed(
    forward: Callable[..., Any],
    contexts: Callable[[], Callable[[], Contexts]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    count, names = len(args), tuple(kwargs)

    def run(*values: Any) -> Any:
        return forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    # All by position: torch 2.14 notices a change in place of these, and of keywords not.
    values = (*args, *kwargs.values())
    return checkpoint(run, *values, use_reentrant=False, context_fn=contexts())
