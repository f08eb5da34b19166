"""ControlNets: a frozen network beside the denoiser, whose residuals every call of it adds.

It reads what the denoiser reads in that very call (x_t, t, text: each role its own) and a control
image, and gives maps that are added inside the denoiser. One copy serves teacher, student and fake.
It is told through the denoiser's own call, so that the base family's `run` need not know of it.
Source: Zhang et al. 2023, arXiv:2302.05543.
"""

# Shapes: B batch, C channels, H, W in px, h, w of a latent.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.core.types import Cond
from stepdistill.families.beside import check_images, pictures, stand_in
from stepdistill.families.family import Family

CONTROLNET = "controlnet"


class ControlNetFamily(Family):
    """A base family, which stands behind it among the bases, with one ControlNet.

    Attributes: control: a picture that stands in where no data are.
    """

    reads: ClassVar[Mapping[str, bool]] = {"control": True}
    image_keys: ClassVar[tuple[str, ...]] = ("control",)

    def __init__(self, pipeline: Any) -> None:
        name = type(pipeline).__name__
        for part, expected in self.side_nets.items():
            self.check_side_class(part, type(getattr(pipeline, part)).__name__, expected, name)
        parts = (self.net_name, *self.side_nets, "vae")
        self.check_configs({part: getattr(pipeline, part).config for part in parts}, name)
        super().__init__(pipeline)
        height, width = self.image_size()
        self.control: Image.Image = stand_in(max(height, width)).resize((width, height))

    # ------------------------------------------------------------ the network
    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run: the base family's, its network told the residuals too."""

        def tell(_net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, **self.residuals(cond, args, kwargs)}

        hook = net.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            return super().run(net, x_t, model_t, cond, w)  # type: ignore[safe-super]
        finally:
            hook.remove()

    @abstractmethod
    def residuals(
        self, cond: Cond, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the denoiser is told beside args and kwargs, the arguments of its call."""

    # -------------------------------------------------------------- the data
    @property
    def call_extras(self) -> dict[str, Any]:
        return {**super().call_extras, self.image_argument: self.control}

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of the base."""
        return super().encode(prompts)  # type: ignore[safe-super]

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """What `encode_at` gives at the model's own size."""
        return self.encode_at(prompts, self.sample_shape())

    def encode_at(self, prompts: Sequence[Any], shape: Sequence[int]) -> Cond:
        """See Family.encode_at: what `with_images` gives of `control`."""
        cond = self.encode_text(prompts)
        return self._with(cond, [self.control] * cond.bsz, shape)

    def null(self, bsz: int) -> Cond:
        """See Family.null, with `control`."""
        text = {k: v for k, v in super().null(bsz).tensors.items() if k not in self.image_keys}
        return self._with(Cond(text), [self.control] * bsz, self.sample_shape())

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """See Family.with_images: control, as `control_of` gives it."""
        check_images(self, images, "with_images")
        rows = pictures(self.pipeline.image_processor, images["control"], most=1)
        return self._with(cond, [picture for (picture,) in rows], shape)

    @torch.no_grad()
    def _with(self, cond: Cond, rows: Sequence[Image.Image], shape: Sequence[int]) -> Cond:
        vae, device = self.pipeline.vae, next(iter(cond.tensors.values())).device
        height, width = (side * self.latent_px for side in shape[-2:])
        at = {"device": vae.device, "dtype": vae.dtype}
        counts = {"batch_size": 1, "num_images_per_prompt": 1}
        made: dict[int, Tensor] = {}  # one by one: the last bits depend on the batch
        for picture in rows:
            if id(picture) not in made:
                pixels = self.pipeline.prepare_image(picture, width, height, **counts, **at)
                made[id(picture)] = self.control_of(pixels).float()
        control = torch.cat([made[id(picture)] for picture in rows]).to(device)
        return Cond({**cond.tensors, "control": control})

    def control_of(self, pixels: Tensor) -> Tensor:
        """What the ControlNet reads of pixels (1, 3, H, W) as the stock call prepares them: here
        themselves."""
        return pixels
