"""Block-causal attention for Wan's transformer: clips chunk by chunk, with a cache of the past.

Tokens of a chunk of latent frames attend to all tokens of chunks up to theirs; the text is attended
to as before. No weight is added. A causal network is called in one of two ways, which agree:
    masked   the whole clip at once, each frame told its own time; what training does
    cached   a chunk at a time; keys (after rotary embedding) and values of the chunks before it are
             remembered from the call at which they were clean. These are values: what has a graph
             is the chunk's own call, which may be recomputed when later chunks are cached too
Sources: Yin et al. 2024, arXiv:2412.07772 (CausVid); Huang et al. 2025, arXiv:2506.08009 (Self
Forcing), where clean chunks are written to the cache by a call of their own at time 0.
"""

# Shapes: B batch, N tokens, F latent frames, H, W spatial, D width.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn


class Causal:
    """What the attention of one network shares: the chunk, and the cache while there is one.

    cache: of each block, keys and values (B, N, heads, D) of one chunk after another, appended and
    never changed; None for the masked call. start: frames before a call's own, whose chunks it
    sees. keeps: whether a call adds its own, which one with a graph must not.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk, self.tokens, self.start = chunk, 0, 0
        self.cache: dict[int, list[tuple[Tensor, Tensor]]] | None = None
        self.keeps = False

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """Contexts in which calls see what they see now: for blocks that are recomputed."""
        cache, start = self.cache, self.start

        @contextmanager
        def again() -> Iterator[None]:
            later = (self.cache, self.start)
            self.cache, self.start = cache, start
            try:
                yield
            finally:
                self.cache, self.start = later

        return again

    def see(self, net: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a call: how many tokens a frame has."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        _, height, width = net.config.patch_size
        self.tokens = (x.shape[3] // height) * (x.shape[4] // width)

    def mask(self, count: int, device: torch.device) -> Tensor:
        """(N, N) whether the token of a row attends to that of a column."""
        chunks = torch.arange(count, device=device) // (self.chunk * self.tokens)
        return chunks.unsqueeze(1) >= chunks

    def shift(self, rope: Any, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """After the rotary table is made: that of the frames where a cached chunk stands."""
        if not self.start:
            return out
        x = args[0]
        longer = x.new_empty(*x.shape[:2], self.start + x.shape[2], *x.shape[3:])
        return tuple(table[:, self.start * self.tokens :] for table in rope.forward(longer))


class CausalAttention(WanAttnProcessor):
    """The stock attention, whose self-attention is block-causal."""

    def __init__(self, state: Causal, block: int) -> None:
        super().__init__()
        self.state, self.block = state, block

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See WanAttnProcessor."""
        state = self.state
        if encoder_hidden_states is not None or state.cache is None:
            mask = attention_mask
            if encoder_hidden_states is None:
                mask = state.mask(hidden_states.shape[1], hidden_states.device)
            made: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, mask, rotary_emb
            )
            return made
        assert rotary_emb is not None, "self-attention has a place for each token"
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        chunks = state.cache.setdefault(self.block, [])
        if state.keeps:
            assert not torch.is_grad_enabled(), "what is remembered is a value"
            chunks.append((key, value))
        seen = [*chunks[: state.start // state.chunk], (key, value)]
        key, value = (torch.cat(pieces, dim=1) for pieces in zip(*seen, strict=True))
        out = dispatch_attention_fn(query, key, value).flatten(2, 3).type_as(query)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out))
        return projected


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, heads, D) turned by the rotary table, pairs of neighbours at a time."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return out.flatten(-2).type_as(x)


def make_causal(net: Any, chunk: int) -> nn.Module:
    """Turn a WanTransformer3DModel causal, in place; returns it. Its weights and names stay."""
    state = Causal(chunk)
    for block, layer in enumerate(net.blocks):
        layer.attn1.set_processor(CausalAttention(state, block))
    net.register_forward_pre_hook(state.see, with_kwargs=True)
    net.rope.register_forward_hook(state.shift)
    made: nn.Module = net
    return made


def is_causal(net: Any) -> bool:
    """Whether `make_causal` made it so."""
    return causal_state(net) is not None


def causal_state(net: Any) -> Causal | None:
    """What the attention of a causal network shares; None of another."""
    first = next((m for m in net.modules() if isinstance(m, WanAttention)), None)
    processor = None if first is None else first.processor
    return processor.state if isinstance(processor, CausalAttention) else None


@contextmanager
def caching(net: Any) -> Iterator[Causal]:
    """Within: calls are of one chunk, at `start`, after those whose calls had `keeps` set."""
    state = causal_state(net)
    assert state is not None, "the caller has asked"
    state.cache, state.start, state.keeps = {}, 0, False
    try:
        yield state
    finally:
        state.cache, state.start, state.keeps = None, 0, False
