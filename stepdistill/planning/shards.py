"""What a process of an FSDP2 run holds beyond its part, from what is gathered at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stepdistill.training.sharding import blocks_of


def gathered_bytes(nets: Iterable[nn.Module]) -> tuple[int, int]:
    """(bytes gathered for the length of a step, the most that one block adds to them).

    A block inside another is gathered on top of what the outer one holds by itself.
    """
    whole_step, most = 0, 0
    for net in nets:
        blocks = {id(block) for block in blocks_of(net)}
        whole_step += _own(net, blocks)
        most = max(most, _deepest(net, blocks, 0))
    return whole_step, most


def _own(module: nn.Module, blocks: set[int]) -> int:
    """Bytes of the module's parameters, those of blocks below it left out."""
    here = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return here + sum(_own(c, blocks) for c in module.children() if id(c) not in blocks)


def _deepest(module: nn.Module, blocks: set[int], above: int) -> int:
    """The largest sum of a block's own bytes and its outer blocks' own."""
    here = above + (_own(module, blocks) if id(module) in blocks else 0)
    return max([here, *(_deepest(child, blocks, here) for child in module.children())])
