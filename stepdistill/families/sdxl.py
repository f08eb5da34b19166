"""Stable Diffusion XL: sd's UNet with two text encoders and size conditions (arXiv:2307.01952)."""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.sd import StableDiffusionFamily


class StableDiffusionXLFamily(StableDiffusionFamily):
    """StableDiffusionXLPipeline. Sizes are told as an uncropped image of the latent's own size."""

    name: ClassVar[str] = "sdxl"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    tiny = "stepdistill.testing.tiny:tiny_sdxl"
    typed: ClassVar[tuple[str, ...]] = ("num_inference_steps",)
    scales_input: ClassVar[bool] = True
    short_pipelines: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if getattr(pipeline.vae.config, "latents_mean", None) is not None:
            raise ValueError(
                "sdxl: expected a VAE with a scaling factor alone, got one with latents_mean. "
                "Playground-style latents have no family."
            )

    def added_conditions(
        self, x_t: Tensor, cond: Cond, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """text_embeds (B, D) and time_ids (B, 6): original size, crop corner, target size in px."""
        factor = self.pipeline.vae_scale_factor
        size = (x_t.shape[-2] * factor, x_t.shape[-1] * factor)
        pooled = cond["pooled"].to(dtype)
        ids = self.time_ids(size, pooled.shape[-1], dtype).to(x_t.device)
        return {"text_embeds": pooled, "time_ids": ids.repeat(x_t.shape[0], 1)}

    def time_ids(self, size: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
        """(1, 6) of images of that size (height, width), px. Args: width: of `pooled`."""
        ids: Tensor = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype, text_encoder_projection_dim=width
        )
        return ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D): both encoders side by side; pooled (B, D') of the second."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            device=self.pipeline.text_encoder_2.device,
            do_classifier_free_guidance=False,
        )
        return Cond({"prompt_embeds": embeds, "pooled": pooled})

    def null(self, bsz: int) -> Cond:
        """Zeros where the pipeline says so (SDXL base does), else the empty prompt."""
        empty = super().null(bsz)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        images = self.image_keys  # a null keeps these
        values = empty.tensors.items()
        return Cond({n: value if n in images else torch.zeros_like(value) for n, value in values})
