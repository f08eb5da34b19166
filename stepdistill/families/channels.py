"""Images beside x_t as channels: one way for the UNets whose first convolution reads them too.

The network reads [x_t, channels]. Methods see x_t alone, and the null condition keeps the channels.
Random numbers in them are drawn once for each picture, whatever row or update it stands in, so that
teacher, fake and student see the same, in this run and in a resumed one: by its content, in the
order of a stock call with a generator of that seed.
"""

# Shapes: B batch, C channels, h, w of the latent, H, W in px.

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.context import stable_seed
from stepdistill.core.types import DRAWN_BY, Cond
from stepdistill.families.beside import pictures
from stepdistill.families.pictured import PicturedFamily


class ChannelFamily(PicturedFamily):
    """Families of one picture a row, of the size that the call's images then have."""

    image_keys: ClassVar[tuple[str, ...]] = ("channels",)
    most_references = 1
    picture_px: ClassVar[int | None] = None  # px of the picture to one latent; None: latent_px

    _drawn_by: Sequence[Image.Image] = ()  # each row's; none: its own picture

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """See Family.with_images. DRAWN_BY, a row's other image, has its random numbers be those of
        that one."""
        by, rest = images.get(DRAWN_BY), {k: v for k, v in images.items() if k != DRAWN_BY}
        if by is not None:
            self._drawn_by = [row[0] for row in pictures(self.pipeline.image_processor, by)]
        try:
            return super().with_images(cond, rest, shape)
        finally:
            self._drawn_by = ()

    @property
    def px_beside(self) -> int:
        """See Family.px_beside."""
        return self.latent_px // (self.picture_px or self.latent_px)

    @abstractmethod
    def beside(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> Tensor:
        """(1, C', h, w): what the stock call puts behind x_t, of a picture that fits it."""

    def fitted(self, picture: Image.Image, shape: Sequence[int]) -> Image.Image:
        """The picture as the stock call takes it for latents of shape (C, h, w)."""
        height, width = (side * (self.picture_px or self.latent_px) for side in shape[-2:])
        if picture.size == (width, height):
            return picture
        resized: Image.Image = self.pipeline.image_processor.resize(picture, height, width)
        return resized

    def generator_of(self, *beside: Image.Image | None) -> torch.Generator:
        """What this row's random numbers are drawn from: by content (or `drawn_from`, if set)."""
        if self.drawn_from is not None:
            return self.drawn_from
        sha = hashlib.sha256()
        for picture in beside:
            sha.update(b"" if picture is None else picture.tobytes())
        return torch.Generator().manual_seed(stable_seed("beside", sha.hexdigest()))

    @torch.no_grad()
    def _with(
        self,
        cond: Cond,
        rows: Sequence[Sequence[Image.Image]],
        shape: Sequence[int],
        masks: Sequence[Image.Image | None] = (),
    ) -> Cond:
        made = []
        by = self._drawn_by or [picture for (picture,) in rows]
        for (picture,), mask, other in zip(rows, masks, by, strict=True):  # bits depend on batches
            given = (self.fitted(picture, shape), mask and self.fitted(mask, shape))
            generator = self._generator(shape, self.fitted(other, shape), given[1])
            made.append(self.beside(*given, generator))
        return Cond({**cond.tensors, "channels": torch.cat(made).float().to(cond.device)})

    def _generator(self, shape: Sequence[int], *beside: Image.Image | None) -> torch.Generator:
        """`generator_of`, behind what the stock call draws before."""
        generator = self.generator_of(*beside)
        if self.drawn_from is None and "images" in self.call_draws:
            for _ in range(self.call_draws.index("images")):
                torch.randn(*shape, generator=generator)
        return generator

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, H, W) in [-1, 1], on the autoencoder's device and in its dtype."""
        vae = self.pipeline.vae
        made: Tensor = self.pipeline.image_processor.preprocess(picture)
        return made.to(vae.device, vae.dtype)

    # -------------------------------------------------------------- checking
    @property
    def call_extras(self) -> dict[str, Any]:
        extras, shape = super().call_extras, self.sample_shape()
        return {
            name: self.fitted(value, shape) if isinstance(value, Image.Image) else value
            for name, value in extras.items()
        }

    def call_rows(self, bsz: int, guidance: float) -> dict[str, Any]:
        """See Family.call_rows: a picture a row, and where it has random numbers a generator."""
        extras = {**self.call_extras, **self.guided_call(guidance)}
        given = {n: v for n, v in extras.items() if isinstance(v, Image.Image)}
        if "images" in self.call_draws:
            extras["generator"] = [self.generator_of(*given.values()) for _ in range(bsz)]
        return {**extras, **{name: [picture] * bsz for name, picture in given.items()}}
