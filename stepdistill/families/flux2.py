"""Flux.2 klein: a joint transformer over Qwen 3 tokens and batch-normed patches, on a flow path.

The 2 x 2 patches are the VAE's own channels here: methods see (B, 4 C, H / 2, W / 2), packed as one
token each. Positions have four axes (time, row, column, text). The stock call shifts its sigmas by
the number of tokens and of steps; trained grids take the shift of its default step count, and an
export keeps the one of its own grid in the scheduler's config.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.references import ReferenceFamily
from stepdistill.families.schedule import empirical_shift
from stepdistill.families.vae import latent_size
from stepdistill.families.vae_sized import PATCH

DEFAULT_STEPS = 50  # the stock call's num_inference_steps
MAX_TOKENS = 512  # the stock call's max_sequence_length
MAX_AREA = 1024 * 1024  # px of a reference, fixed in the stock call


class Flux2Family(ReferenceFamily):
    """Flux2KleinPipeline. A step-distilled one (is_distilled) ignores guidance: it has no null."""

    name: ClassVar[str] = "flux2"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    tiny = "stepdistill.testing.tiny_flux2:tiny_flux2"
    typed = ("num_inference_steps",)
    dynamic_shift = True
    reads: ClassVar[Mapping[str, bool]] = {"image": False}
    net_name: ClassVar[str] = "transformer"
    sends_sigmas: ClassVar[float] = 1.0
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.linear_in", "ff.linear_out", "to_qkv_mlp_proj"),
    )

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        # In full: in the joint blocks a list of modules, which takes no adapter, ends so.
        single = range(self.config.num_single_layers)
        outs = (f"single_transformer_blocks.{i}.attn.to_out" for i in single)
        self.lora_targets = (*type(self).lora_targets, *outs)  # type: ignore[misc]
        self.has_null = self.null_in(pipeline.config)

    def shift_at(
        self, height: int | None = None, width: int | None = None, num_steps: int = DEFAULT_STEPS
    ) -> float:
        """See Family.shift_at."""
        config = self.pipeline.scheduler.config
        _, rows, columns = self.sample_shape(height, width)
        if not config.get("use_dynamic_shifting"):
            return super().shift_at(height, width)
        return empirical_shift(config, rows * columns, num_steps)

    @classmethod
    def null_in(cls, index: Any) -> bool:
        """See Family.null_in: the call of a step-distilled pipeline makes no null pass."""
        return not index.get("is_distilled", False)

    @property
    def latent_channels(self) -> int:
        channels: int = self.config.in_channels
        return channels

    @property
    def latent_px(self) -> int:
        factor: int = self.pipeline.vae_scale_factor * PATCH
        return factor

    @property
    def size_multiple(self) -> int:
        return self.latent_px

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        factor = self.latent_px
        size = self.size_px // factor
        return (self.latent_channels, *(latent_size(px, size, factor) for px in (height, width)))

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, tuple(shape[-2:]))

    def embedded_guidance(self, model_t: Tensor, w: Tensor | None) -> Tensor | None:
        """(B,) the network's guidance input: klein has none."""
        return None

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype, images = net_dtype(net), self.images_of(x_t, cond)
        ids = [self.pipeline._prepare_latent_ids(x_t)]
        if images[1:]:
            ids += [self.pipeline._prepare_image_ids([x[:1] for x in images[1:]])]
        ids[1:] = [references.expand(len(x_t), -1, -1) for references in ids[1:]]
        embeds = cond["prompt_embeds"].to(dtype)
        out: Tensor = net(
            hidden_states=self.packed(images, dtype),
            timestep=model_t.float() / 1000,  # the transformer multiplies by 1000 again
            guidance=self.embedded_guidance(model_t, w),
            encoder_hidden_states=embeds,
            txt_ids=self.pipeline._prepare_text_ids(embeds).to(x_t.device),
            img_ids=torch.cat(ids, dim=1).to(x_t.device),
            return_dict=False,
        )[0]
        return self.of_x_t(out, x_t)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", joint then single: image tokens (a block returns text, image)."""
        config = self.config
        counts = {
            "transformer_blocks": config.num_layers,
            "single_transformer_blocks": config.num_single_layers,
        }
        width = config.num_attention_heads * config.attention_head_dim
        return token_blocks(width, item=1, **counts)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, 3 D): hidden states of three layers, padding included."""
        embeds, _ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            device=self.pipeline.text_encoder.device,
            max_sequence_length=MAX_TOKENS,
        )
        return Cond({"prompt_embeds": embeds})

    def reference_pixels(self, picture: Image.Image) -> Tensor:
        """See ReferenceFamily.reference_pixels: at most a megapixel, of whole tokens."""
        processor, multiple = self.pipeline.image_processor, self.latent_px
        picture = processor._resize_if_exceeds_area(picture, MAX_AREA)
        height, width = (s // multiple * multiple for s in (picture.height, picture.width))
        pixels: Tensor = processor.preprocess(picture, height, width, resize_mode="crop")
        return pixels

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: it goes on as a step-distilled one."""
        pipeline.register_to_config(is_distilled=True)
        return True
