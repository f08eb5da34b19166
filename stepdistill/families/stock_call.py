"""The stock pipeline's own call: what it must be told, and how its numbers stand beside ours."""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.encoding import Encoding
from stepdistill.families.vae import encoding_modes


class StockCall(Encoding):
    """What `check`, exports and validation need to know of the call."""

    @property
    def call_extras(self) -> dict[str, Any]:
        """Arguments that keep the stock call at the model's own size, where its defaults do not."""
        return {}

    def call_rows(self, bsz: int, guidance: float) -> dict[str, Any]:
        """`call_extras` of a call with so many prompts that is guided by g."""
        return self.call_extras

    @property
    def length_call(self) -> dict[str, Any]:
        """The part of `call_extras` that a student's card tells: where a model states what the
        stock call can't know, or its default is not for few steps."""
        return {}

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """Arguments that make the stock call's images of that size, px."""
        return {"height": height, "width": width}

    def stock_guidance(self, guidance: float) -> float:
        """guidance_scale of the stock call for g of null + g (cond - null), or for g told."""
        return guidance

    def guided_call(self, guidance: float) -> dict[str, Any]:
        """What else the stock call must be told for a student that is still guided by g."""
        return {}

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """Make a pipeline with the student in it heed no guidance_scale, as if told `guidance`.

        By what its stock call reads from a config or weight; False where it reads nothing.
        """
        return False

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents after the stock loop as the stock call decodes them: here themselves."""
        return latents

    def net_for(self, net: nn.Module, scheduler: Any) -> nn.Module:
        """`net` as it answers under a stock scheduler: another where that one counts time anew."""
        return net

    def net_code(self, scheduler: Any) -> str:
        """What `net_for` does to `pipe`, as Python for a card; empty where it does nothing."""
        return ""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, *S) in the layout that the stock call keeps them in."""
        return latents

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, C, *S) of what `pack` made, or the network put out; shape: (C, *S)."""
        return packed

    @classmethod
    def images_in(cls, result: Any) -> Tensor:
        """(B, C, H, W) or (B, C, F, H, W) in [0, 1] of what a stock call returned as "pt"."""
        images: Tensor = getattr(result, cls.output)
        return images.transpose(1, 2) if cls.output == "frames" else images

    @classmethod
    def encodings(cls, pipeline: Any) -> AbstractContextManager[None]:
        """Within: calls of a stock pipeline encode images as a Cond has them: those whose numbers a
        Cond does not draw, by the mode of what the call would draw."""
        if "images" in cls.call_draws:
            return nullcontext()
        return encoding_modes(getattr(pipeline, "vae", None))

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of the stock pipeline's own `__call__`, to compare with."""
        return self.images_in(
            self.pipeline(
                prompt=list(prompts),
                guidance_scale=self.stock_guidance(guidance),
                num_inference_steps=num_steps,
                output_type="pt",
                **{"generator": generator, **self.call_rows(len(prompts), guidance)},
            )
        )
