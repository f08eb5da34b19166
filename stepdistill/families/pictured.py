"""Families that read pictures beside x_t: what stands in for data, and the way to a Cond."""

# Shapes: B batch, K pictures, C channels, H, W spatial.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.beside import check_images, pictures, stand_in, stand_in_mask
from stepdistill.families.family import Family


class PicturedFamily(Family):
    """Families whose stock call begins with pictures, as PIL.

    Attributes: reference, mask: what `encode` gives beside each prompt; None where none is needed.
        most_references: how many the stock call takes; None for any number. picture: of the names
        in `reads`, that of these pictures.
    """

    reads: ClassVar[Mapping[str, bool]] = {"image": True}
    picture: ClassVar[str] = "image"
    most_references: int | None = None

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        needs, size = self.needs_images(), self.image_size()
        self.reference: Image.Image | None = stand_in(*size) if self.picture in needs else None
        self.mask: Image.Image | None = stand_in_mask(*size) if "mask" in needs else None

    @abstractmethod
    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text."""

    @abstractmethod
    def _with(
        self,
        cond: Cond,
        rows: Sequence[Sequence[Image.Image]],
        shape: Sequence[int],
        masks: Sequence[Image.Image | None] = (),
    ) -> Cond:
        """`with_images` of B lists of K pictures, and B masks where it reads them."""

    @property
    def call_extras(self) -> dict[str, Any]:
        beside = {self.image_argument: self.reference, "mask_image": self.mask}
        given = {name: picture for name, picture in beside.items() if picture is not None}
        return {**super().call_extras, **given}

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """What `with_images` gives of `reference` and `mask`, or of none."""
        return self.encode_at(prompts, self.sample_shape())

    def encode_at(self, prompts: Sequence[Any], shape: Sequence[int]) -> Cond:
        """See Family.encode_at."""
        cond = self.encode_text(prompts)
        if self.reference is None:
            return cond
        return self._with(cond, [[self.reference]] * cond.bsz, shape, [self.mask] * cond.bsz)

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """See Family.with_images."""
        check_images(self, images, "with_images")
        if not images:
            return cond
        processor = self.pipeline.image_processor
        rows = pictures(processor, images[self.picture], self.most_references)
        masks = (
            [None] * len(rows)
            if "mask" not in images
            else processor.numpy_to_pil(images["mask"].float().cpu().permute(0, 2, 3, 1).numpy())
        )
        return self._with(cond, rows, shape, masks)
