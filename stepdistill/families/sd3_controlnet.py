"""Stable Diffusion 3 and 3.5 with a ControlNet, which reads the control image's latents.

Those of InstantX are read without the autoencoder's shift, and beside a pooled prompt of zeros
(`force_zeros_for_pooled_projection`, which their configuration says or leaves at its default); 3.5
Large's read no text, and share the patch embedding of the transformer.
"""

# Shapes: B batch, C channels, h, w of a latent, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.control import CONTROLNET, ControlNetFamily
from stepdistill.families.family import net_dtype
from stepdistill.families.residuals import at_dtype
from stepdistill.families.sd3 import StableDiffusion3Family
from stepdistill.families.vae import encode_images


class StableDiffusion3ControlNetFamily(ControlNetFamily, StableDiffusion3Family):
    """StableDiffusion3ControlNetPipeline; control (B, C, h, w)."""

    name: ClassVar[str] = "sd3_controlnet"
    settings_of: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3ControlNetPipeline",)
    tiny = "stepdistill.testing.tiny_control:tiny_sd3_controlnet"
    dynamic_shift = False
    image_argument: ClassVar[str] = "control_image"
    side_nets: ClassVar[Mapping[str, str]] = {CONTROLNET: "SD3ControlNetModel"}
    shared_config: ClassVar[tuple[str, ...]] = (
        *("patch_size", "attention_head_dim", "num_attention_heads", "in_channels"),
        *("joint_attention_dim", "pooled_projection_dim"),
    )

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """See Family.check_configs; also whether it reads the latents alone."""
        super().check_configs(configs, where)
        extra = configs[CONTROLNET].get("extra_conditioning_channels")
        if extra:
            raise ValueError(
                f"{where}/{CONTROLNET}: expected one that reads the control image's latents alone, "
                f"got extra_conditioning_channels {extra} (a mask's). Its pipeline for inpainting "
                "has no family."
            )

    @property
    def _as_instantx(self) -> bool:
        return bool(self.pipeline.controlnet.config.force_zeros_for_pooled_projection)

    def control_of(self, pixels: Tensor) -> Tensor:
        """See ControlNetFamily.control_of."""
        vae = self.pipeline.vae
        scaled = encode_images(vae, pixels)
        shift = vae.config.shift_factor * vae.config.scaling_factor
        return scaled + shift if self._as_instantx else scaled

    def residuals(
        self, cond: Cond, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ControlNetFamily.residuals."""
        net, x_t = self.pipeline.controlnet, kwargs["hidden_states"]
        pooled, text = kwargs["pooled_projections"], kwargs["encoder_hidden_states"]
        inputs = {
            "hidden_states": x_t,
            "controlnet_cond": cond["control"],
            "pooled_projections": torch.zeros_like(pooled) if self._as_instantx else pooled,
            "encoder_hidden_states": None if net.config.joint_attention_dim is None else text,
        }
        plain = {"timestep": kwargs["timestep"], "return_dict": False}
        (samples,) = net(**at_dtype(inputs, net_dtype(net)), **plain)
        return {"block_controlnet_hidden_states": at_dtype(samples, x_t.dtype)}
