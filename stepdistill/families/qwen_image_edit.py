"""Qwen-Image-Edit: Qwen-Image that reads the image to edit twice.

Its latent goes beside x_t as further tokens, brought to about a megapixel whatever its size; and
the image goes before the prompt through Qwen2.5-VL, so that prompt, and null prompt too, are
encoded anew for each image: a Cond has both. Until images are at hand it has the prompt as UTF-8.
Edit-Plus (2509, 2511) reads several, each named before the prompt, which Qwen2.5-VL sees smaller;
2511's transformer tells their tokens t = 0, by its own config.
"""

# Shapes: B batch, N tokens, D width.

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.qwen_image import MAX_TOKENS, NEGATIVE, QwenImageFamily
from stepdistill.families.references import ReferenceFamily

AREA = 1024 * 1024  # px that stock calls bring references to, and Edit what Qwen2.5-VL sees
MAX_BYTES = 4096  # of a prompt's UTF-8


class QwenImageEditFamily(ReferenceFamily, QwenImageFamily):
    """QwenImageEditPipeline, QwenImageEditPlusPipeline. Neither call takes several prompts."""

    name: ClassVar[str] = "qwen_image_edit"
    pipelines: ClassVar[tuple[str, ...]] = (
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    tiny = "stepdistill.testing.tiny_video:tiny_qwen_image_edit"
    variants = {"qwen_image_edit_2511": {"plus": True, "zero_cond_t": True}}
    typed = ("num_inference_steps",)
    one_prompt: ClassVar[bool] = True

    def __init__(self, pipeline: Any) -> None:
        self.stock = sys.modules[type(pipeline).__module__]  # has the rules of its sizes
        self.told_area = getattr(self.stock, "CONDITION_IMAGE_SIZE", AREA)
        self.most_references = None if self.told_area != AREA else 1
        super().__init__(pipeline)

    def _resized(self, picture: Image.Image, area: int) -> Image.Image:
        width, height = self.stock.calculate_dimensions(area, picture.width / picture.height)[:2]
        made: Image.Image = self.pipeline.image_processor.resize(picture, height, width)
        return made

    def reference_pixels(self, picture: Image.Image) -> Tensor:
        """See ReferenceFamily.reference_pixels."""
        fitted = self._resized(picture, AREA)
        pixels: Tensor = self.pipeline.image_processor.preprocess(
            fitted, fitted.height, fitted.width
        )
        return pixels

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """text (B, MAX_BYTES) uint8: UTF-8, zero after each prompt's end.

        Errors: ValueError for a longer prompt.
        """
        coded = [prompt.encode() for prompt in check_prompts(prompts)]
        if any(len(text) > MAX_BYTES for text in coded):
            raise ValueError(
                f"encode: expected prompts of at most {MAX_BYTES} bytes, got one of "
                f"{max(map(len, coded))}. Shorten it."
            )
        rows = [
            torch.frombuffer(bytearray(t.ljust(MAX_BYTES, b"\0")), dtype=torch.uint8) for t in coded
        ]
        return Cond({"text": torch.stack(rows)})

    def told(self, cond: Cond, rows: Sequence[Sequence[Image.Image]]) -> Cond:
        """prompt_embeds (B, N, D) of image and prompt, zero after each row's length (B,); the same
        of the null prompt in null_embeds and null_length."""
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in cond["text"]]
        made = [self._told(text, row) for text, row in zip(texts, rows, strict=True)]
        return Cond.cat(made)

    def _told(self, prompt: str, row: Sequence[Image.Image]) -> Cond:
        """One row of `told`; N depends on its images alone. Errors: ValueError for long prompts."""
        seen: Any = [self._resized(picture, self.told_area) for picture in row]
        pipe, device = self.pipeline, self.pipeline.text_encoder.device
        images = seen if self.most_references is None else seen[0]
        embeds, null = (
            pipe.encode_prompt(image=images, prompt=[text], device=device)[0]
            for text in (prompt, NEGATIVE)
        )
        lengths, most = (embeds.shape[1], null.shape[1]), null.shape[1] - 1 + MAX_TOKENS
        if lengths[0] > most:
            raise ValueError(
                f"encode: expected a prompt of at most {MAX_TOKENS} tokens, got "
                f"{MAX_TOKENS + lengths[0] - most}. Shorten it."
            )
        padded = [pad(x, (0, 0, 0, most - x.shape[1])) for x in (embeds, null)]
        counts = [torch.tensor([length]) for length in lengths]
        names = ("prompt_embeds", "null_embeds", "length", "null_length")
        return Cond(dict(zip(names, (*padded, *counts), strict=True)))

    def null_for(self, cond: Cond, null: Cond | None = None) -> Cond:
        """See Family.null_for: the null prompt as it was encoded with these very images."""
        swapped = {"prompt_embeds": cond["null_embeds"], "length": cond["null_length"]}
        return Cond({**cond.tensors, **swapped})
