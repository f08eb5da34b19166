"""Flux.1 with a ControlNet that reads the control image's latents (InstantX) or pixels (XLabs).

It is told the guidance where it has that input, and is folded with the transformer at export. A
union's kind of control image is an entry `control_mode` in its config.json. A transformer that is
told none is guided by a null pass, of which the stock call has the residuals of the prompt.
"""

# Shapes: B batch, C channels, N tokens, D width, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.control import CONTROLNET, ControlNetFamily
from stepdistill.families.family import net_dtype
from stepdistill.families.flux import FluxFamily
from stepdistill.families.flux_guidance import fold_guidance
from stepdistill.families.residuals import at_dtype
from stepdistill.families.vae import encode_images

TEXT = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled"}


class FluxControlNetFamily(ControlNetFamily, FluxFamily):
    """FluxControlNetPipeline; control (B, C, h, w) scaled latents, or (B, 3, H, W) in [-1, 1]."""

    name: ClassVar[str] = "flux_controlnet"
    settings_of: ClassVar[str] = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxControlNetPipeline",)
    tiny = "stepdistill.testing.tiny_control:tiny_flux_controlnet"  # type: ignore[assignment]
    image_keys: ClassVar[tuple[str, ...]] = ("control", "control_prompt_embeds", "control_pooled")
    image_argument: ClassVar[str] = "control_image"
    side_nets: ClassVar[Mapping[str, str]] = {CONTROLNET: "FluxControlNetModel"}
    shared_config: ClassVar[tuple[str, ...]] = (
        *("in_channels", "attention_head_dim", "num_attention_heads"),
        *("joint_attention_dim", "pooled_projection_dim"),
    )

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """See Family.check_configs; also whether a union is told its kind of image."""
        super().check_configs(configs, where)
        control = configs[CONTROLNET]
        modes, mode = control.get("num_mode"), control.get("control_mode")
        if modes is not None and not (type(mode) is int and 0 <= mode < modes):
            raise ValueError(
                f"{where}/{CONTROLNET}/config.json: expected control_mode of a union, a whole "
                f"number from 0 to {modes - 1} (its card says which), got {mode!r}. Write that "
                "entry: the data are of one kind."
            )

    @property
    def _reads_pixels(self) -> bool:
        return self.pipeline.controlnet.input_hint_block is not None

    def control_of(self, pixels: Tensor) -> Tensor:
        """See ControlNetFamily.control_of."""
        return pixels if self._reads_pixels else encode_images(self.pipeline.vae, pixels)

    def _with(self, cond: Cond, rows: Sequence[Any], *at: Any) -> Cond:
        made = super()._with(cond, rows, *at)
        if self.embeds_guidance:
            return made
        text = {f"control_{name}": cond[name] for name in TEXT.values()}
        return Cond({**made.tensors, **text})

    def residuals(
        self, cond: Cond, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See ControlNetFamily.residuals."""
        net, x_t = self.pipeline.controlnet, kwargs["hidden_states"]
        beside = {argument: cond.get(f"control_{name}") for argument, name in TEXT.items()}
        text = {k: kwargs[k] if value is None else value for k, value in beside.items()}
        mode, guidance = self.length_call.get("control_mode"), kwargs["guidance"]
        if net.config.guidance_embeds and guidance is None:
            guidance = torch.ones(len(x_t), device=x_t.device)
        control = cond["control"]
        joint, single = net(
            **at_dtype({"hidden_states": x_t, **text}, net_dtype(net)),
            controlnet_cond=(control if self._reads_pixels else self.pack(control)).to(
                net_dtype(net)
            ),
            controlnet_mode=None
            if mode is None
            else torch.full((len(x_t), 1), mode, device=x_t.device),
            timestep=kwargs["timestep"],
            guidance=guidance if net.config.guidance_embeds else None,
            txt_ids=kwargs["txt_ids"],
            img_ids=kwargs["img_ids"],
            return_dict=False,
        )
        return {
            "controlnet_block_samples": at_dtype(joint, x_t.dtype),
            "controlnet_single_block_samples": at_dtype(single, x_t.dtype),
            "controlnet_blocks_repeat": self._reads_pixels,
        }

    @property
    def length_call(self) -> dict[str, Any]:
        """See Family.length_call: the kind of control image, of a union."""
        config = self.pipeline.controlnet.config
        mode = {} if config.num_mode is None else {"control_mode": config["control_mode"]}
        return {**super().length_call, **mode}

    @property
    def call_extras(self) -> dict[str, Any]:
        """See Family.call_extras: a ControlNet beside a network that is told none is told 1."""
        untold = {} if self.embeds_guidance else {"guidance_scale": 1.0}
        return {**super().call_extras, **self.length_call, **untold}

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: of both networks."""
        if pipeline.controlnet.config.guidance_embeds:
            folded = fold_guidance(pipeline.controlnet, guidance)
            pipeline.register_modules(controlnet=folded)
        return super().settle_guidance(pipeline, guidance)
