"""Wan image to video: the text family with a first frame in its condition.

Wan 2.1 reads the frame as further channels (a mask and its latent) and as CLIP tokens (2.2's A14B
without these) and makes every frame itself. 2.2's 5B keeps the first latent frame clean and tells
it t = 0. There the output at that frame is set to what leads to the clean latent: teacher, fake and
student agree on it, so no loss sees it and no sampler moves it (Magic 1-For-1, arXiv:2502.07701).
"""

# Shapes: B batch, C channels, F frames, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.path import expand
from stepdistill.core.types import Cond
from stepdistill.families.beside import check_images, pictures
from stepdistill.families.wan import STOCK_SIZE, WanFamily


class WanImageToVideoFamily(WanFamily):
    """WanImageToVideoPipeline with one transformer or two; `first_frame` stands in for data."""

    name: ClassVar[str] = "wan_i2v"
    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    tiny = "stepdistill.testing.tiny_video:tiny_wan_i2v"
    variants = {
        "wan_i2v_kept": {"expand_timesteps": True},
        "wan_i2v_experts": {"boundary_ratio": 0.9},
    }
    causal: ClassVar[bool] = False
    reads: ClassVar[Mapping[str, bool]] = {"image": True}
    image_keys: ClassVar[tuple[str, ...]] = ("frame", "frame_tokens")

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        _, height, width = self.size
        # No flat colour, on which a wrong scale or order of rows would not show.
        self.first_frame: Image.Image = Image.linear_gradient("L").resize((width, height))
        self.first_frame = self.first_frame.convert("RGB")

    @classmethod
    def frame_size_in(cls, vae: Mapping[str, Any]) -> tuple[int, int]:
        """See Family.frame_size_in."""
        return tuple((vae.get("sample_size") or STOCK_SIZE)[1:])

    @property
    def keeps_first(self) -> bool:
        """Whether the first latent frame is the clean one (2.2's 5B)."""
        return bool(self.pipeline.config.expand_timesteps)

    @property
    def call_extras(self) -> dict[str, Any]:
        return {**super().call_extras, "image": self.first_frame}

    def token_times(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        """See WanFamily.token_times: 0 for the tokens of a first frame that is kept."""
        times = super().token_times(x_t, model_t)
        if not self.keeps_first:
            return times
        later = torch.ones_like(times)
        later[:, : times.shape[1] // x_t.shape[2]] = 0.0
        return times * later

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        model: Any = net
        dtype, frame, tokens = model.dtype, cond["frame"].to(x_t), cond.get("frame_tokens")
        if self.keeps_first:
            joined = torch.cat([frame, x_t[:, :, 1:]], dim=2)
        else:
            joined = torch.cat([x_t, frame], dim=1)
        out: Tensor = model(
            hidden_states=joined.to(dtype),
            timestep=self.token_times(x_t, model_t),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_hidden_states_image=None if tokens is None else tokens.to(dtype),
            return_dict=False,
        )[0]
        return self._toward(out, x_t, model_t, frame) if self.keeps_first else out

    def _toward(self, out: Tensor, x_t: Tensor, model_t: Tensor, frame: Tensor) -> Tensor:
        """The flow `out` (B, C, F, H, W) with that from `frame` (B, C, 1, H, W) at frame 0."""
        t = expand(model_t / self.path.model_time(torch.ones(())).to(model_t), x_t)
        flow = (x_t[:, :, :1].float() - frame) / t.clamp_min(1e-6).float()
        return torch.cat([flow.to(out.dtype), out[:, :, 1:]], dim=2)

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: prompt_embeds (B, N, D)."""
        return super().encode(prompts)

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D), and of `first_frame` what `with_images` gives."""
        cond = self.encode_text(prompts)
        return self._with(cond, [self.first_frame] * cond.bsz, self.sample_shape())

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """See Family.with_images: frame (B, 4 + C, F, H, W), or (B, C, 1, H, W) where it is kept;
        frame_tokens (B, N, D) of CLIP where the transformer reads them."""
        check_images(self, images, "with_images")
        frames = pictures(self.pipeline.video_processor, images["image"], most=1)
        return self._with(cond, [frame for (frame,) in frames], shape)

    @torch.no_grad()
    def _with(self, cond: Cond, frames: Sequence[Image.Image], shape: Sequence[int]) -> Cond:
        pipe, device = self.pipeline, cond["prompt_embeds"].device
        at = pipe.vae.device  # where the encoders are: pixels take no way through the run's device
        rows: dict[str, list[Tensor]] = {"frame": []}
        if self.config.image_dim is not None:
            rows["frame_tokens"] = []
        height, width = (side * pipe.vae_scale_factor_spatial for side in shape[-2:])
        length = (shape[1] - 1) * pipe.vae_scale_factor_temporal + 1
        for picture in frames:  # one by one: the last bits depend on the batch
            pixels = pipe.video_processor.preprocess(picture, height=height, width=width)
            sizes = (height, width, length, torch.float32, at)
            # Latents of its own, which nobody reads here, it would draw from a global generator.
            unread = {"latents": torch.empty(0)}
            pixels = pixels.to(at, torch.float32)
            made = pipe.prepare_latents(pixels, 1, shape[0], *sizes, **unread)
            rows["frame"].append(made[1])
            if "frame_tokens" in rows:
                rows["frame_tokens"].append(pipe.encode_image(picture, at))
        # Prompts that were encoded on the host wait there for the run to fetch them; these do not.
        home = at if device.type == "cpu" else device
        image_conditions = {name: torch.cat(values).to(home) for name, values in rows.items()}
        return Cond({"prompt_embeds": cond["prompt_embeds"], **image_conditions})

    # -------------------------------------------------------------- checking
    def from_raw(self, out: Tensor, x_t: Tensor, model_t: Tensor) -> Tensor:
        return self._toward(out, x_t, model_t, self._clean(out)) if self.keeps_first else out

    def decoded(self, latents: Tensor) -> Tensor:
        """See Family.decoded: the stock call puts the clean frame back."""
        if not self.keeps_first:
            return latents
        return torch.cat([self._clean(latents), latents[:, :, 1:]], dim=2)

    def _clean(self, like: Tensor) -> Tensor:
        """(B, C, 1, H, W) latent of `first_frame`."""
        return self.encode([""]).repeat(len(like))["frame"].to(like)
