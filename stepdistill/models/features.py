"""Capture hidden states of named blocks during one forward call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture(net: nn.Module, blocks: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Within: a dict that fills with name -> hidden states, graph attached.

    Args: blocks: feature name -> module path inside `net`. A block that returns a tuple gives its
    first tensor: (B, C, H, W) for UNets, (B, N, D) for transformers.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, path in blocks.items():

        def hook(_m: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            found[name] = out[0] if isinstance(out, tuple) else out

        handles.append(net.get_submodule(path).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
