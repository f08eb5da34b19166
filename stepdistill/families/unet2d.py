"""Pixel-space UNets: unconditional DDPM models, and EDM-type models, also by class (no VAE).

Pixels in [-1, 1] are the latents. EDM (Karras et al. 2022, arXiv:2206.00364, Eq. 7) reads D, the
denoised image, from the raw output F:
    D = c_skip x + c_out F(c_in x, c_noise),  s = sigma_data
    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(...)
c_noise is ln(sigma) / 4 where the pipeline's scheduler is EDM's, 250 ln(sigma) where it is that of
consistency models (Song et al. 2023, arXiv:2303.01469). There is no null class: no guidance.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMPipeline, DDPMPipeline
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock, unet_blocks


class UNet2DFamily(Family):
    """DDPMPipeline and DDIMPipeline: a UNet2DModel told the time alone.

    A DDIMPipeline turns any scheduler it is given into DDIM's, so it is held as a DDPMPipeline.
    """

    name: ClassVar[str] = "unet2d"
    pipelines: ClassVar[tuple[str, ...]] = ("DDPMPipeline", "DDIMPipeline")
    tiny = "stepdistill.testing.tiny_pixels:tiny_unet2d"
    typed = ("num_inference_steps",)
    one_size: ClassVar[bool] = True
    latent_px = 1  # its samples are the pixels
    net_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    )
    conditioning: Literal["prompt", "label", "none"] = "none"
    has_null = False

    def __init__(self, pipeline: Any) -> None:
        if isinstance(pipeline, DDIMPipeline):
            pipeline = DDPMPipeline(pipeline.unet, pipeline.scheduler)
        super().__init__(pipeline)
        config = self.config
        if config.out_channels != config.in_channels or config.in_channels not in (1, 3):
            raise ValueError(
                f"{self.name}: expected a UNet from 1 or 3 channels to as many, got "
                f"{config.in_channels} to {config.out_channels}. Learned variances have no family."
            )
        if self.conditioning == "none" and config.num_class_embeds is not None:
            raise ValueError(
                f"{self.name}: expected a UNet without classes, got {config.num_class_embeds}: the "
                "call of this pipeline passes no labels. Save it as a ConsistencyModelPipeline."
            )

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        scaled = self.scale_input(x_t, model_t).to(net_dtype(net))
        out: Tensor = net(
            scaled, model_t.float(), class_labels=cond.get("class_labels"), return_dict=False
        )[0]
        return self.from_raw(out, x_t, model_t)

    def scale_input(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        """What the network is shown of x_t (B, C, H, W)."""
        return x_t

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid", "down.i" and "up.i", all maps."""
        return unet_blocks(self.config.block_out_channels)

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, H, W) of the one size the stock call makes. Errors: ValueError for another."""
        size = self.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        for pixels, side in zip((height, width), sides, strict=True):
            if pixels not in (None, side):
                raise ValueError(f"{self.name}: expected {sides} px (its only size), got {pixels}.")
        return (self.config.in_channels, *sides)

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """B rows without content, whatever the prompts."""
        return Cond({"nothing": torch.empty(len(prompts), 0, device=self.pipeline.unet.device)})

    def null(self, bsz: int) -> Cond:
        """A stand-in: a batch has a null, but guidance with it is refused."""
        return self.encode([0] * bsz)

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The pixels (B, C, H, W) themselves; a grey model reads the mean of the colours."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"latents: expected images (B, 3, H, W), got {tuple(images.shape)}.")
        return images.float() if self.config.in_channels == 3 else images.float().mean(1, True)

    def images(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), unclamped: grey ones repeat their channel."""
        return latents.float().expand(-1, 3, -1, -1)

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call; there is no guidance."""
        labels = {"class_labels": list(prompts)} if self.conditioning == "label" else {}
        images: Tensor = self.pipeline(
            batch_size=len(prompts),
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
            **labels,
        ).images
        return images
