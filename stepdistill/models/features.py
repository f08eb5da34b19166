"""Capture hidden states of named blocks during one forward call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stepdistill.models.family import FeatureBlock


@contextmanager
def capture(net: nn.Module, blocks: Mapping[str, FeatureBlock]) -> Iterator[dict[str, Tensor]]:
    """Within: a dict that fills with name -> hidden states, graph attached.

    Args: blocks: feature name -> where in `net` to read. Maps are (B, C, H, W), tokens (B, N, D).
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, block in blocks.items():

        def hook(
            _m: nn.Module, _args: Any, out: Any, name: str = name, item: int = block.item
        ) -> None:
            found[name] = out[item] if isinstance(out, tuple) else out

        handles.append(net.get_submodule(block.module).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
