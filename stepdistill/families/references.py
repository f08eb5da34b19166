"""Reference images as tokens: one way for every transformer that reads them after those of x_t.

The network sees the tokens of x_t, then those of each reference's clean latent, told apart by their
positions; of its output the first count. Attention does the rest, so an image to edit and one to
borrow from are the same to it. Methods see x_t alone.
"""

# Shapes: B batch, K references, C channels, h, w of a reference's latent, H, W spatial, N tokens.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.pictured import PicturedFamily
from stepdistill.families.vae_sized import VaeSizedFamily


class SequenceFamily(VaeSizedFamily):
    """Families of packed tokens, with or without those of references behind them."""

    def images_of(self, x_t: Tensor, cond: Cond) -> list[Tensor]:
        """x_t (B, C, H, W), and the latents (B, C, h, w) of the condition's references, if any."""
        references = cond.get("references")
        return [x_t, *(() if references is None else references.unbind(1))]

    def tokens_of(self, x_t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """(B, N, D) that the network reads."""
        return self.packed(self.images_of(x_t, cond), dtype)

    def packed(self, images: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(B, N, D) tokens of all of them, in order."""
        return torch.cat([self.pack(latents.to(dtype)) for latents in images], dim=1)

    def of_x_t(self, out: Tensor, x_t: Tensor) -> Tensor:
        """(B, C, H, W) that a network put out for x_t, which comes first in `out` (B, N, D)."""
        return self.unpack(out[:, : self._tokens(x_t)], x_t.shape[1:])

    def _tokens(self, latents: Tensor) -> int:
        return self.pack(latents[:1]).shape[1]

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """See Family.image_features: the tokens of x_t, whatever text stands before or references
        behind them."""
        counts = [self._tokens(latents) for latents in self.images_of(x_t, cond)]
        starts = {name: value.shape[1] - sum(counts) for name, value in features.items()}
        return {
            name: value[:, starts[name] : starts[name] + counts[0]]
            for name, value in features.items()
        }


class ReferenceFamily(PicturedFamily, SequenceFamily):
    """Those that read references, which `with_images` encodes: references (B, K, C, h, w), scaled
    latents."""

    image_keys: ClassVar[tuple[str, ...]] = ("references",)

    @abstractmethod
    def reference_pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, h px, w px) in [-1, 1] that the stock call makes of a reference."""

    def told(self, cond: Cond, rows: Sequence[Sequence[Image.Image]]) -> Cond:
        """The Cond of `encode_text` as these references change it: here itself."""
        return cond

    @torch.no_grad()
    def _with(
        self,
        cond: Cond,
        rows: Sequence[Sequence[Image.Image]],
        shape: Sequence[int] = (),
        masks: Sequence[Image.Image | None] = (),
    ) -> Cond:
        device = cond.device
        latents = [  # one by one: the last bits depend on the batch
            torch.cat([self.latents(self.reference_pixels(picture)) for picture in row])
            for row in rows
        ]
        made = self.told(cond, rows).to(device)
        return Cond({**made.tensors, "references": torch.stack(latents).float().to(device)})
