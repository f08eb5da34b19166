"""Where discriminator heads may read, and the capture of hidden states during one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FeatureBlock:
    """Where a discriminator head may read: module path, width, and token or map layout.

    item: which tensor to take where the module returns a tuple.
    """

    module: str
    dim: int
    layout: Literal["map", "tokens"]
    item: int = 0


def token_blocks(width: int, item: int = 0, **counts: int) -> dict[str, FeatureBlock]:
    """ "mid" and "block.i", numbered on over lists of transformer blocks.

    Args: counts: name of a module list -> its length, in order. item: see FeatureBlock.
    """
    paths = [f"{name}.{i}" for name, count in counts.items() for i in range(count)]
    blocks = {
        f"block.{i}": FeatureBlock(path, width, "tokens", item) for i, path in enumerate(paths)
    }
    return {"mid": blocks[f"block.{len(paths) // 2}"], **blocks}


def unet_blocks(widths: Sequence[int]) -> dict[str, FeatureBlock]:
    """ "mid", "down.i" and "up.i" of a UNet with these block_out_channels, all maps."""
    blocks = {"mid": FeatureBlock("mid_block", widths[-1], "map")}
    for side, side_widths in (("down", list(widths)), ("up", list(reversed(widths)))):
        for i, width in enumerate(side_widths):
            blocks[f"{side}.{i}"] = FeatureBlock(f"{side}_blocks.{i}", width, "map")
    return blocks


@contextmanager
def leave_out(net: nn.Module, blocks: Mapping[str, FeatureBlock]) -> Iterator[None]:
    """Within: these transformer blocks of `net` give back the tokens that they were given."""

    def returns_input(item: int) -> Any:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if not isinstance(out, tuple):
                return image
            text = kwargs["encoder_hidden_states"] if "hidden_states" in kwargs else args[1]
            return tuple(image if i == item else text for i in range(len(out)))

        return hook

    handles = [
        net.get_submodule(block.module).register_forward_hook(
            returns_input(block.item), with_kwargs=True
        )
        for block in blocks.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chosen_blocks(
    names: Sequence[str], blocks: Mapping[str, FeatureBlock]
) -> dict[str, FeatureBlock]:
    """The blocks of these names, in order; "all" among them stands for each place once.

    Errors: KeyError for an unknown name.
    """
    if "all" not in names:
        return {name: blocks[name] for name in names}
    places = {block.module: name for name, block in blocks.items()}  # "mid" may be one of a list
    return {name: blocks[name] for name in places.values()}


class _AllFound(BaseException):
    """Ends a network's forward pass behind the last feature; no handler in it keeps this."""


@contextmanager
def capture(
    net: nn.Module, blocks: Mapping[str, FeatureBlock], only: bool = False, calls: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Within: a dict that fills with name -> hidden states, graph attached.

    Args:
        blocks: feature name -> where in `net` to read. Maps are (B, C, H, W), tokens (B, N, D).
        only: nothing but the features is wanted: the call within ends, and this block with it, as
            soon as all are found, so what lies behind them is neither run nor kept for backward.
        calls: of the network within; rows of the next ones come behind.
    """
    features: dict[str, Tensor] = {}
    reads = 0
    handles = []
    for name, block in blocks.items():

        def hook(
            _m: nn.Module, _args: Any, out: Any, name: str = name, item: int = block.item
        ) -> None:
            nonlocal reads
            read = out[item] if isinstance(out, tuple) else out
            features[name] = torch.cat([features[name], read]) if name in features else read
            reads += 1
            if only and reads == calls * len(blocks):
                raise _AllFound

        handles.append(net.get_submodule(block.module).register_forward_hook(hook))
    try:
        with suppress(_AllFound):
            yield features
    finally:
        for handle in handles:
            handle.remove()
