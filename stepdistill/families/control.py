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
from stepdistill.families.pictured import PicturedFamily

CONTROLNET = "controlnet"


class ControlNetFamily(PicturedFamily):
    """A base family, which stands behind it among the bases, with one ControlNet."""

    reads: ClassVar[Mapping[str, bool]] = {"control": True}
    picture: ClassVar[str] = "control"
    most_references = 1
    image_keys: ClassVar[tuple[str, ...]] = ("control",)

    def __init__(self, pipeline: Any) -> None:
        name = type(pipeline).__name__
        for part, expected in self.side_nets.items():
            self.check_side_class(part, type(getattr(pipeline, part)).__name__, expected, name)
        parts = (self.net_name, *self.side_nets, "vae")
        self.check_configs({part: getattr(pipeline, part).config for part in parts}, name)
        super().__init__(pipeline)

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
    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of the base."""
        return super(PicturedFamily, self).encode(prompts)  # type: ignore[safe-super]

    def null(self, bsz: int) -> Cond:
        """See Family.null, with `reference`."""
        text = {k: v for k, v in super().null(bsz).tensors.items() if k not in self.image_keys}
        assert self.reference is not None, "it needs one"
        return self._with(Cond(text), [[self.reference]] * bsz, self.sample_shape())

    @torch.no_grad()
    def _with(
        self,
        cond: Cond,
        rows: Sequence[Sequence[Image.Image]],
        shape: Sequence[int],
        masks: Sequence[Image.Image | None] = (),
    ) -> Cond:
        """What `control_of` gives of each."""
        vae = self.pipeline.vae
        height, width = (side * self.latent_px for side in shape[-2:])
        at = {"device": vae.device, "dtype": vae.dtype}
        counts = {"batch_size": 1, "num_images_per_prompt": 1}
        made: dict[int, Tensor] = {}  # one by one: the last bits depend on the batch
        for (picture,) in rows:
            if id(picture) not in made:
                pixels = self.pipeline.prepare_image(picture, width, height, **counts, **at)
                made[id(picture)] = self.control_of(pixels).float()
        control = torch.cat([made[id(picture)] for (picture,) in rows]).to(cond.device)
        return Cond({**cond.tensors, "control": control})

    def control_of(self, pixels: Tensor) -> Tensor:
        """What the ControlNet reads of pixels (1, 3, H, W) as the stock call prepares them: here
        themselves."""
        return pixels
