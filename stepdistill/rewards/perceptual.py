"""LPIPS: distance of two images in the features of a network trained on ImageNet.

Each position's features are normalised, squared differences weighted by heads fitted to human
judgements, and averaged over positions. Heads and layout come from the `lpips` package.
Source: Zhang et al. 2018, arXiv:1801.03924.
Differs from the package: a position without any activity has gradient zero, there it is NaN.
"""

# Shapes: B batch, H, W image size in px, D feature width.

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from stepdistill.loading.safe_files import read_tensors
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.rewards.base import FrozenScorer

_TORCHVISION = {
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
}


class LPIPSScorer(FrozenScorer):
    """Perceptual distance (B,) of images and references, both in [-1, 1]; lower is nearer."""

    kind: ClassVar[str] = "lpips"
    judges_by = "images"
    Options: ClassVar[type[LPIPSOptions]] = LPIPSOptions

    @classmethod
    def check(cls, options: LPIPSOptions) -> None:
        """Errors: ValueError without the lpips package, for a missing or a pickled weights file."""
        if importlib.util.find_spec("lpips") is None:
            raise ValueError(
                "scorer lpips: expected the lpips package, got none. "
                'pip install "stepdistill[rewards]"'
            )
        if options.weights is None:
            return
        if Path(options.weights).suffix != ".safetensors":
            raise ValueError(
                f"scorer lpips: expected a .safetensors file as weights, got {options.weights!r}. "
                "Pickled files can run code and are not read; only torchvision's own cached file "
                "is (weights: null), by its hash and with weights_only. Convert yours with "
                "safetensors.torch.save_file."
            )
        if not Path(options.weights).is_file():
            raise ValueError(
                f"scorer lpips: expected weights to be a file, got {options.weights!r}. "
                f"torchvision's {options.backbone} state dict is one; null takes its cache."
            )

    def __init__(self, options: LPIPSOptions, weights: bool = True) -> None:
        if weights:
            self.check(options)
        super().__init__(options)
        import lpips
        from diffusers.models.modeling_utils import no_init_weights

        self.options = options
        # It builds a whole classifier (of up to 138 M) for its first layers, which are then loaded.
        with warnings.catch_warnings(), no_init_weights():
            warnings.simplefilter("ignore")  # lpips builds its backbone by a deprecated argument
            self.net = lpips.LPIPS(net=options.backbone, pnet_rand=True, verbose=False)
        if weights:
            load_backbone(self.net.net, options)
        if options.pooling == "avg":
            for block in self.net.net.children():
                for name, layer in block.named_children():
                    if isinstance(layer, nn.MaxPool2d):
                        setattr(block, name, nn.AvgPool2d(layer.kernel_size, layer.stride))

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit features (B, D, H', W') of five layers, of images in [-1, 1]."""
        size, below = self.options.resize, self.options.resize_below
        if size is not None and (below is None or images.shape[-1] < below):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        layers = self.net.net(self.net.scaling_layer(images))
        return [F.normalize(layer, dim=1, eps=1e-10) for layer in layers]

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by: references (B, 3, H, W), which may carry gradients too."""
        if not isinstance(by, Tensor) or by.shape != images.shape:
            got = tuple(by.shape) if isinstance(by, Tensor) else type(by).__name__
            raise ValueError(
                f"scorer lpips: expected references of shape {tuple(images.shape)}, got {got}."
            )
        pairs = zip(self.features(images), self.features(by.float()), self.net.lins, strict=True)
        return torch.stack([head((a - b) ** 2).mean(dim=(1, 2, 3)) for a, b, head in pairs]).sum(0)


def load_backbone(net: nn.Module, options: LPIPSOptions) -> None:
    """Fill lpips' slices of a torchvision network with ImageNet weights, in place.

    Errors: ValueError where weights can't be had, or are of another network.
    """
    if options.weights is None:
        try:
            state = _TORCHVISION[options.backbone].get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except (URLError, OSError) as err:
            raise ValueError(
                f"scorer lpips: expected {options.backbone}'s weights in torchvision's cache or a "
                f"network to fetch them, got {err}. Give their file as weights: PATH."
            ) from err
    else:
        state = read_tensors(options.weights)
    # "slice2.5.weight" here is "features.5.weight" there.
    wanted = {
        f"features.{name.partition('.')[2]}": value for name, value in net.state_dict().items()
    }
    wrong = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise ValueError(
            f"scorer lpips: expected torchvision's {options.backbone} weights, got a file without "
            f"{wrong[:3]} of the right shape."
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(state[name])
