"""What stock UNets can be told beside text: a camera as class labels, control images as residuals.

threestudio's fake reads c2w, 16 numbers, through a TimestepEmbedding put at `class_embedding`; a
stock UNet of class_embed_type "projection" is that very network. DreamMat's ControlNet has 22 input
channels, `ControlNetModel.from_unet(unet, conditioning_channels=22)`: depth 1, normal 3, six light
renders of 3 each. Both are told to the network's own call, so that a family need not know of them.
Sources: arXiv:2305.16213 (released code), arXiv:2405.17176 and its code.
"""

# Shapes: B batch, R rows of one call (a multiple of B), K control channels, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.types import Cond
from stepdistill.families.residuals import unet_residuals

CAMERA_WIDTH = 16


@dataclass(frozen=True)
class SideInputs:
    """camera: (B, 4, 4) camera to world, or (B, 16). control: (B, K, H, W) in [0, 1], of any
    size. Null and negative conditions keep both."""

    camera: Tensor | None = None
    control: Tensor | None = None

    def __post_init__(self) -> None:
        if self.camera is not None and self.camera.flatten(1).shape[1] != CAMERA_WIDTH:
            raise ValueError(
                "camera: expected camera-to-world matrices (B, 4, 4), got "
                f"{tuple(self.camera.shape)}."
            )


def camera_embedding(net: nn.Module) -> TimestepEmbedding:
    """A trainable projection of cameras to the width of a UNet's time embedding, float32.

    Errors: ValueError for a network that is no UNet2DConditionModel or reads labels already.
    """
    if not isinstance(net, UNet2DConditionModel) or net.class_embedding is not None:
        reads = "one that reads class labels" if hasattr(net, "class_embedding") else "none"
        raise ValueError(
            f"camera: expected a UNet2DConditionModel without class labels, got {reads} "
            f"({type(net).__name__}). Leave the camera out."
        )
    return TimestepEmbedding(CAMERA_WIDTH, net.time_embedding.linear_2.out_features)


def check_control(controlnet: Any, control: Tensor) -> None:
    """Errors: ValueError for control images of another number of channels than it reads."""
    channels = controlnet.config.conditioning_channels
    if control.ndim != 4 or control.shape[1] != channels:
        raise ValueError(
            f"control: expected images (B, {channels}, H, W) as the ControlNet reads them, got "
            f"{tuple(control.shape)}."
        )


class Told(Denoiser):
    """A role's denoiser whose UNet is told these inputs of B at every call, of R rows.

    Args: net: the UNet that computes it. embedding: `camera_embedding`, without which the camera
        isn't told. controlnet: without which control isn't. scale: of its residuals.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        net: nn.Module,
        inputs: SideInputs,
        embedding: nn.Module | None = None,
        controlnet: Any = None,
        scale: float = 1.0,
    ) -> None:
        self._denoiser, self._net, self._scale = denoiser, net, scale
        self._camera = None if embedding is None else inputs.camera
        self._control = None if controlnet is None else inputs.control
        self._embedding, self._controlnet = embedding, controlnet
        self.path, self.kind = denoiser.path, denoiser.kind
        self.embeds_guidance, self.has_null = denoiser.embeds_guidance, denoiser.has_null

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """See Denoiser.guide."""
        return self._denoiser.guide(cond, null, guidance)

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw."""
        hook = self._net.register_forward_pre_hook(self._tell, with_kwargs=True)
        unet: Any = self._net
        try:
            if self._camera is not None:
                unet.class_embedding = self._embedding
            return self._denoiser.raw(x_t, t, cond, w, features)
        finally:
            hook.remove()
            if self._camera is not None:
                unet.class_embedding = None

    def _tell(self, _net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        more, x_t = dict(kwargs), args[0]

        def rows(one: Tensor) -> Tensor:
            return one.repeat(len(x_t) // len(one), *[1] * (one.ndim - 1))

        if self._camera is not None:
            more["class_labels"] = rows(self._camera.flatten(1)).float()
        if self._control is not None:
            control = rows(self._sized(x_t))
            more |= unet_residuals(self._controlnet, args, more, control, self._scale)
        return args, more

    def _sized(self, x_t: Tensor) -> Tensor:
        """The control images at the size of which the ControlNet makes that of x_t."""
        assert self._control is not None
        halvings = len(self._controlnet.config.conditioning_embedding_out_channels) - 1
        size = [side * 2**halvings for side in x_t.shape[-2:]]
        if [*self._control.shape[-2:]] == size:
            return self._control
        return F.interpolate(self._control, size, mode="bilinear", antialias=True)
