"""InstructPix2Pix: sd's UNet that reads the image to edit as its latent (arXiv:2211.09800).

The stock call guides twice, by text and by image: u + g (t - i) + g_i (i - u), of the outputs with
both (t), with the image alone (i) and with neither (u, a latent of zeros). Here the guidance by the
image goes with that by text, g_i = 1 + r (g - 1), which makes it guidance away from one null
output, n + g (t - n) with n = (1 - r) i + r u. The r here gives the call's own 1.5 at its own 7.5.
"""

# Shapes: B batch, C channels, h, w of the latent.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.channels import ChannelFamily
from stepdistill.families.encoding import check_prompts
from stepdistill.families.sd import StableDiffusionFamily


class InstructPix2PixFamily(ChannelFamily, StableDiffusionFamily):
    """StableDiffusionInstructPix2PixPipeline.

    Attributes: image_share: r above; 0 for guidance by text alone, one call less for a null.
    """

    name: ClassVar[str] = "instruct_pix2pix"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionInstructPix2PixPipeline",)
    tiny = "stepdistill.testing.tiny_beside:tiny_instruct_pix2pix"
    typed = ("num_inference_steps", "guidance_scale")
    supports_w: ClassVar[bool] = False  # its call has no input for it
    scales_input: ClassVar[bool] = True
    short_pipelines: ClassVar[tuple[str, ...]] = ()
    image_share: float = 0.5 / 6.5

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """See Family.size_options: its images have the given one's size."""
        return {}

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels: those of another latent."""
        return 2 * int(vae["latent_channels"])

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D), and imageless (B,): the share of a call without the image."""
        device = self.pipeline.text_encoder.device
        embeds = self.pipeline._encode_prompt(check_prompts(prompts), device, 1, False)
        return Cond({"prompt_embeds": embeds, "imageless": torch.zeros(len(embeds))})

    def null(self, bsz: int) -> Cond:
        """See Family.null, and above: of n, r without the image."""
        empty = super().null(bsz)
        return Cond({**empty.tensors, "imageless": torch.full((bsz,), self.image_share)})

    def beside(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> Tensor:
        """See ChannelFamily.beside: the posterior's mode, without the autoencoder's scale."""
        mode: Tensor = self.pipeline.vae.encode(self.pixels(picture)).latent_dist.mode()
        return mode

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run; rows with an imageless share are asked twice, in the same call."""
        shares = cond["imageless"].tolist()
        rows = [row for row, share in enumerate(shares) if share]
        if not rows:
            return super().run(net, x_t, model_t, cond, w)

        def with_again(values: Tensor) -> Tensor:
            return torch.cat([values, *(values[row : row + 1] for row in rows)])

        told = {name: with_again(value) for name, value in cond.tensors.items()}
        told["channels"] = torch.cat(
            [cond["channels"], torch.zeros_like(told["channels"][len(x_t) :])]
        )
        out = super().run(net, with_again(x_t), with_again(model_t), Cond(told), w)
        mixed = list(out.split(1))
        for again, row in enumerate(rows, len(x_t)):
            mixed[row] = torch.lerp(mixed[row], mixed[again], shares[row])
        return torch.cat(mixed[: len(x_t)])

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """See Family.image_features: of calls with the image alone."""
        return {name: value[: len(x_t)] for name, value in features.items()}

    def guided_call(self, guidance: float) -> dict[str, Any]:
        """See Family.guided_call."""
        return {"image_guidance_scale": 1.0 + self.image_share * (guidance - 1.0)}
