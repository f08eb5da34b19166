"""A frozen vision network whose hidden states discriminator heads read (ADD).

A Transformers vision model (DINOv2) by its folder or Hub id, or the small network that `stepdistill
features train` makes of a user's own images; both differentiable in the images, in float32.
Source: Sauer et al. 2023, arXiv:2311.17042, Sec. 3.1 (heads on DINOv2).
"""

# Shapes: B batch, H, W image size in px, D feature width, N tokens.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.families.features import FeatureBlock, chosen_blocks
from stepdistill.losses.pixels import PixelOptions
from stepdistill.rewards.base import FrozenScorer
from stepdistill.rewards.vision import (
    ConvFeatures,
    learned_config,
    load_vision,
    read_learned,
    vision_half,
)


class PixelFeatures(FrozenScorer):
    """Implements core.method.PixelNet; as a scorer, the distance (B,) of two images in all blocks.

    blocks: "block.i" of each layer, by number, and "mid".
    """

    kind: ClassVar[str] = "features"
    judges_by = "images"
    Options: ClassVar[type[PixelOptions]] = PixelOptions
    mean: Tensor
    std: Tensor

    @classmethod
    def check(cls, options: PixelOptions) -> None:
        """Errors: ValueError without a network, or for what is none."""
        if options.network is None:
            raise ValueError(
                "network: expected a folder or Hub id of a vision model, got none. Give "
                "DINOv2's (facebook/dinov2-small), or a network of your own images: stepdistill "
                "features train."
            )
        if learned_config(options.network) is None:
            _vision_config(options.network)

    def __init__(self, options: PixelOptions, weights: bool = True) -> None:
        """Args: weights: whether to read them; a forecast needs shapes alone."""
        self.check(options)
        nn.Module.__init__(self)
        assert options.network is not None, "checked"
        learned = learned_config(options.network)
        if learned is not None:
            shape = int(learned["size_px"]), int(learned["width"])
            self.net: Any = read_learned(options.network)[0] if weights else ConvFeatures(*shape)
            side, means, stds = shape[0], 3 * (learned["mean"],), 3 * (learned["std"],)
        else:
            side, means, stds = self._load(options.network, weights)
        self.size_px = options.size_px or side
        for name, values in (("mean", means), ("std", stds)):
            made = torch.tensor([float(value) for value in values]).view(1, 3, 1, 1)
            self.register_buffer(name, made, persistent=False)
        with torch.no_grad():
            device = next(self.net.parameters()).device
            shown = self._states(torch.zeros(1, 3, self.size_px, self.size_px, device=device))
        listed = {f"block.{i}": _block(i, state) for i, state in enumerate(shown)}
        self.blocks = {"mid": listed[f"block.{len(shown) // 2}"], **listed}

    def _load(self, network: str, weights: bool) -> tuple[int, Any, Any]:
        """Set net; returns the side, means and deviations of its images."""
        if not weights:
            from transformers import AutoModel

            config = _vision_config(network)
            self.net = vision_half(AutoModel.from_config(config))
            return _side(self.net.config), (0.5,) * 3, (0.5,) * 3
        self.net, processor = load_vision(network, "network")
        means, stds = (getattr(processor, f"image_{name}", (0.5,) * 3) for name in ("mean", "std"))
        return _side(self.net.config), means, stds

    def _states(self, pixels: Tensor) -> list[Tensor]:
        if isinstance(self.net, ConvFeatures):
            return self.net.maps(pixels)
        hidden = self.net(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [*hidden[1:]]  # the first are the patches themselves

    def features(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """See core.method.PixelNet. Errors: KeyError for an unknown block."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.float()
            if pixels.shape[-2:] != (self.size_px, self.size_px):
                pixels = F.interpolate(
                    pixels, (self.size_px, self.size_px), mode="bicubic", antialias=True
                )
            states = self._states((0.5 * pixels + 0.5 - self.mean) / self.std)
        chosen = chosen_blocks(names, self.blocks)
        return {name: states[block.item] for name, block in chosen.items()}

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by: references (B, 3, H, W), which may carry gradients too."""
        ours, theirs = self.features(images, ("all",)), self.features(by, ("all",))
        errors = [(ours[name] - theirs[name]).square().flatten(1).mean(1) for name in ours]
        return torch.stack(errors).sum(0)


def _block(index: int, state: Tensor) -> FeatureBlock:
    if state.ndim == 4:
        return FeatureBlock(f"states.{index}", state.shape[1], "map", index)
    return FeatureBlock(f"states.{index}", state.shape[2], "tokens", index)


def _side(config: Any) -> int:
    side = getattr(config, "image_size", 224)
    return int(side[0] if isinstance(side, list | tuple) else side)


def _vision_config(network: str) -> Any:
    """The config of a Transformers model. Errors: ValueError where there is none, or is not of
    images."""
    from transformers import AutoConfig

    local = Path(network)
    try:
        config: Any = AutoConfig.from_pretrained(network, trust_remote_code=False)
    except (OSError, ValueError) as err:
        kind = "a folder" if local.is_dir() else "no folder here, and no such Hub id at hand"
        raise ValueError(
            f"network: expected a folder or Hub id of a vision model (config.json and "
            f"safetensors), got {network!r} ({kind})."
        ) from err
    if not hasattr(getattr(config, "vision_config", config), "image_size"):
        raise ValueError(
            f"network: expected a model of images, got {network!r} of "
            f"{config.model_type}. Name a vision model, as facebook/dinov2-small."
        )
    return config
