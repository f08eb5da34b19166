"""DiT: class-conditional transformer on VP latents (Peebles & Xie 2023, arXiv:2212.09748).

Learned-sigma checkpoints return 2C channels; the first C are the prediction, the rest is dropped
as the stock pipeline drops it.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks


class DiTFamily(Family):
    """DiTPipeline. A prompt is a class id (int) or one of the pipeline's label names (str)."""

    name: ClassVar[str] = "dit"
    pipelines: ClassVar[tuple[str, ...]] = ("DiTPipeline",)
    tiny = "stepdistill.testing.tiny:tiny_dit"
    supports_s: ClassVar[bool] = False  # each block embeds the time anew
    net_name: ClassVar[str] = "transformer"
    scales_input: ClassVar[bool] = True
    one_size: ClassVar[bool] = True  # the position table's
    conditioning: Literal["prompt", "label", "none"] = "label"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        # The stock class forgets its label names on saving unless they are in its config.
        names: dict[int, list[str]] = {}
        for label, index in pipeline.labels.items():
            names.setdefault(index, []).append(label)
        if names:
            pipeline.register_to_config(id2label={i: ", ".join(n) for i, n in names.items()})

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        out: Tensor = net(
            x_t.to(net_dtype(net)),
            timestep=model_t.float(),  # exact for indices; the sinusoid is float32 anyway
            class_labels=cond["class_labels"],
            return_dict=False,
        )[0]
        return out[:, : self.config.in_channels]

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", image tokens."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, transformer_blocks=self.config.num_layers)

    @classmethod
    def labels_in(cls, config: Any) -> int | None:
        return config.get("num_embeds_ada_norm")  # type: ignore[no-any-return]

    @property
    def latent_px(self) -> int:
        factor: int = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return factor

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, H, W) of the one size the position table holds.

        Errors: ValueError for any other size in px.
        """
        size, factor = self.config.sample_size, self.latent_px
        for pixels in (height, width):
            if pixels is not None and pixels != size * factor:
                raise ValueError(f"dit: expected {size * factor} px (its only size), got {pixels}.")
        return (self.config.in_channels, size, size)

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """class_labels (B,) int64, from ids or label names.

        Errors: ValueError for an id outside 0..K-1 or an unknown label name.
        """
        ids = [self._class_id(prompt) for prompt in prompts]
        return Cond({"class_labels": torch.tensor(ids, device=self.pipeline.transformer.device)})

    def _class_id(self, prompt: Any) -> int:
        if isinstance(prompt, str):
            class_id: int = self.pipeline.get_label_ids([prompt])[0]
            return class_id
        count = self.config.num_embeds_ada_norm
        if not isinstance(prompt, Integral) or not 0 <= int(prompt) < count:
            raise ValueError(f"dit: expected a label name or an id 0..{count - 1}, got {prompt!r}.")
        return int(prompt)

    def null(self, bsz: int) -> Cond:
        """The extra last class, which training put in place of dropped labels."""
        labels = torch.full((bsz,), self.config.num_embeds_ada_norm)
        return Cond({"class_labels": labels.to(self.pipeline.transformer.device)})

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call. The stock null class is 1000, whatever the table's size."""
        images: Tensor = self.pipeline(
            class_labels=[self._class_id(prompt) for prompt in prompts],
            guidance_scale=guidance,
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
        ).images
        return images
