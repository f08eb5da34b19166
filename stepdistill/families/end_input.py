"""The input of a student that is told where its jump ends, in the time embedders it has.

A sinusoid of 1000 (t - s) through a bias-free projection is added to what a TimestepEmbedding of
Diffusers embeds: its own `condition`. The projection starts at zero, so that the copy first answers
as the original, whatever s.
Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, Sec. 4.1 (embeddings of t and t - r).
"""

# Shapes: B batch, D width of the sinusoid.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from stepdistill.families.unet_guidance import GUIDANCE_EMBED_DIM, guidance_embedding


def time_embedders(net: nn.Module) -> list[Any]:
    """The network's embedders of time: not those of guidance or of sizes."""
    return [
        module
        for name, module in net.named_modules()
        if isinstance(module, TimestepEmbedding) and "time" in name.rpartition(".")[2]
    ]


def with_end_input(net: nn.Module) -> nn.Module:
    """The network itself, its time embedders reading t - s from now on. Errors: ValueError."""
    embedders = time_embedders(net)
    if not embedders or any(module.cond_proj is not None for module in embedders):
        raise ValueError(
            f"{type(net).__name__}: expected a time embedder free to read where a jump ends, got "
            f"{'one that reads guidance' if embedders else 'none'}. Turn off what asks for it."
        )
    for module in embedders:
        like = module.linear_1.weight
        module.cond_proj = nn.Linear(
            GUIDANCE_EMBED_DIM, module.linear_1.in_features, False, like.device, like.dtype
        )
        nn.init.zeros_(module.cond_proj.weight)
    return net


@contextmanager
def told_end(net: nn.Module, interval: Tensor | None) -> Iterator[None]:
    """Within: the embedders of `with_end_input` are told interval = t - s (B,); None leaves it."""
    if interval is None:
        yield
        return

    def tell(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        condition = guidance_embedding(interval, GUIDANCE_EMBED_DIM)
        return args[0], condition.to(args[0].dtype)

    hooks = [module.register_forward_pre_hook(tell) for module in time_embedders(net)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
