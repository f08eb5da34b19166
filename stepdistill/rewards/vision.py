"""Vision networks from their folders: a Transformers model, or the small network that
`stepdistill features train` makes. Heads read their hidden states, distances their features.
"""

# B batch, C channels, H, W in px, D feature width, S side in px

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.loading.safe_files import no_pickles, read_tensors
from stepdistill.storage.files import read_json

KIND = "stepdistill_features"  # model_type of config.json
_LEARNED = ("size_px", "width", "mean", "std", "data")


class ConvFeatures(nn.Module):
    """(B, D) means of the last two of three levels of convolutions; D = 6 width.

    A first convolution brings S px to about 16, levels halve that.
    """

    def __init__(self, size_px: int, width: int) -> None:
        super().__init__()
        stride = max(1, size_px // 16)
        first = nn.Conv2d(3, width, 2 * stride + 1, stride, stride)
        widths = [
            (width, width),
            (width, 2 * width),
            (2 * width, 2 * width),
            (2 * width, 4 * width),
        ]
        convs = [first, *(nn.Conv2d(a, b, 3, padding=1) for a, b in widths)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, conv.bias))
        self.layers = nn.ModuleList(convs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Of standardised pixels (B, 3, S, S), or smaller crops."""
        return torch.cat([one.mean(dim=(2, 3)) for one in self.maps(pixels)[-2:]], dim=1)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """What each convolution makes of them, (B, C, H, W)."""
        made = []
        for place, layer in enumerate(self.layers):
            if place in (2, 4) and min(pixels.shape[-2:]) > 1:
                pixels = F.avg_pool2d(pixels, 2)
            pixels = F.relu(layer(pixels))
            made.append(pixels)
        return made


def learned_config(folder: str | Path) -> dict[str, Any] | None:
    """What config.json says of such a network; None in a folder of another kind, or none."""
    file = Path(folder) / "config.json"
    if not file.is_file() or read_json(file).get("model_type") != KIND:
        return None
    return read_json(file, _LEARNED)


def read_learned(folder: str | Path) -> tuple[ConvFeatures, dict[str, Any]]:
    """Such a network and its config. Errors: ValueError for weights of another network."""
    path = Path(folder).resolve()
    config = read_json(path / "config.json", _LEARNED)
    net = ConvFeatures(int(config["size_px"]), int(config["width"]))
    try:
        net.load_state_dict(read_tensors(path / "model.safetensors"))
    except RuntimeError as err:
        raise ValueError(
            f"features {path.name}: expected the weights that its config.json describes, got "
            f"others. Make it again: stepdistill features train. {err}"
        ) from err
    return net, config


def load_vision(model: str, where: str) -> tuple[Any, Any]:
    """A Transformers vision model and its image processor.

    Args: model: folder or Hub id, in safetensors; of one of images and text, its first half.
        where: begins messages.
    Errors: ValueError where there is none.
    """
    from transformers import AutoModel

    try:
        processor = processor_of(model, where)
        with no_pickles(where):
            net = AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as err:
        raise ValueError(
            f"{where}: expected a folder or Hub id of a vision model in safetensors, "
            f"got {model!r}. {err}"
        ) from err
    return vision_half(net), processor


def vision_half(net: Any) -> Any:
    """The network of images in a model of images and text; else the model itself."""
    return net.vision_model if "vision_config" in net.config.to_dict() else net


def processor_of(model: str, where: str) -> Any:
    """How its images are prepared. Args: where: begins a warning."""
    from transformers import AutoImageProcessor, ViTImageProcessor

    folder = Path(model)
    if not folder.is_dir() or (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    side = read_json(folder / "config.json").get("image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    warnings.warn(
        f"{where}: expected a preprocessor_config.json in {model}, got none: images come "
        f"at {height} x {width} px in [-1, 1]. Save the model's processor beside it where it was "
        "trained on others.",
        stacklevel=5,
    )
    return ViTImageProcessor(size={"height": height, "width": width})
