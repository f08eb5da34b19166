"""Stable Diffusion 1.x and 2.x with a ControlNet, which reads the control image's pixels."""

# Shapes: B batch, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stepdistill.core.types import Cond
from stepdistill.families.control import CONTROLNET, ControlNetFamily
from stepdistill.families.residuals import unet_residuals
from stepdistill.families.sd import StableDiffusionFamily

COLOURS = 3


class UNetControlNetFamily(ControlNetFamily):
    """A UNet with its ControlNet; control (B, 3, H, W) in [0, 1], not in [-1, 1]."""

    side_nets: ClassVar[Mapping[str, str]] = {CONTROLNET: "ControlNetModel"}
    shared_config: ClassVar[tuple[str, ...]] = (
        *("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"),
        *("addition_embed_type", "projection_class_embeddings_input_dim"),
    )

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """See Family.check_configs; also whether it is one of pictures, and of every pass."""
        super().check_configs(configs, where)
        control, where = configs[CONTROLNET], f"{where}/{CONTROLNET}"
        channels = control.get("conditioning_channels", COLOURS)
        if channels != COLOURS:
            raise ValueError(
                f"{where}: expected a ControlNet of pictures, conditioning_channels {COLOURS}, got "
                f"{channels}. Columns of items hold pictures alone."
            )
        if control.get("global_pool_conditions"):
            raise ValueError(
                f"{where}: expected a ControlNet that is read in both passes of guidance, got one "
                "with global_pool_conditions (guess mode: nothing in the null pass). Use another."
            )
        levels = len(control.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
        deep = len(configs["vae"].get("block_out_channels", (64,)))
        if levels != deep:
            raise ValueError(
                f"{where}: expected conditioning_embedding_out_channels of {deep} levels, as the "
                f"vae has, got {levels}. Use a ControlNet that was trained for this base."
            )

    def residuals(
        self, cond: Cond, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ControlNetFamily.residuals."""
        return unet_residuals(self.pipeline.controlnet, args, kwargs, cond["control"])


class StableDiffusionControlNetFamily(UNetControlNetFamily, StableDiffusionFamily):
    """StableDiffusionControlNetPipeline."""

    name: ClassVar[str] = "sd_controlnet"
    settings_of: ClassVar[str] = "sd"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionControlNetPipeline",)
    tiny = "stepdistill.testing.tiny_control:tiny_sd_controlnet"
    typed: ClassVar[tuple[str, ...]] = ("num_inference_steps",)
    short_pipelines: ClassVar[tuple[str, ...]] = ()
