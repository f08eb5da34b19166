"""CLIP: cosine of an image's and its prompt's embedding, differentiable in the image.

Model, weights, tokenizer and preprocessing figures are open_clip's; only the preprocessing runs on
tensors, so that gradients reach the image (open_clip's own goes through PIL).
OpenAI's weights and some others were trained with QuickGELU: a tag of open_clip's table says so; a
local file doesn't, so its model has to be named with "-quickgelu" (ViT-L-14-quickgelu).
Source: Radford et al. 2021, arXiv:2103.00020.
"""

# Shapes: B batch, H, W image size in px, D embedding width.

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor

from stepdistill.loading.quiet import without_warnings
from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.base import FrozenScorer


class CLIPScorer(FrozenScorer):
    """Cosine (B,) of images in [-1, 1] and B prompts; higher fits better."""

    kind: ClassVar[str] = "clip"
    mean: Tensor
    std: Tensor
    Options: ClassVar[type[CLIPOptions]] = CLIPOptions

    @classmethod
    def check(cls, options: CLIPOptions) -> None:
        """Errors: ValueError for an unknown model, folder, tag or file."""
        name, weights = options.model, options.pretrained
        schema, rest = open_clip.factory.parse_model_name(name)
        if schema is not None:
            if weights is not None:
                raise ValueError(
                    f"scorer clip: expected pretrained null beside {name!r}, which brings its own "
                    f"weights, got {weights!r}."
                )
            if schema == "local-dir" and not (Path(rest) / "open_clip_config.json").is_file():
                raise ValueError(
                    f"scorer clip: expected a folder with open_clip_config.json, got {rest!r}."
                )
            return
        if open_clip.get_model_config(name) is None:
            raise ValueError(
                f"scorer clip: expected a model of open_clip.list_models(), got {name!r}."
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights is None or not (weights in tags or Path(weights).is_file()):
            raise ValueError(
                f"scorer clip: expected pretrained to be one of {tags} or a file, got {weights!r}."
                + _file_of_openai(name)
            )

    def __init__(self, options: CLIPOptions, weights: bool = True) -> None:
        super().__init__(options)
        self.model = self.loaded(options, weights)
        self.tokenizer = self.tokenizer_of(options)
        config = self.preprocessing()
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.resize_mode = config["resize_mode"]
        if self.resize_mode not in ("shortest", "squash"):
            raise ValueError(
                f"scorer {self.kind}: expected a model whose images are cropped or squashed, got "
                f"resize_mode {self.resize_mode!r}."
            )
        for name in ("mean", "std"):
            values = torch.tensor(config[name]).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def loaded(self, options: Any, weights: bool) -> Any:
        """The towers: encode_image and encode_text, with normalize. Args: see FrozenScorer."""
        arguments: dict[str, Any] = {
            "force_quick_gelu": quick_gelu(options.model, options.pretrained)
        }
        try:
            if weights:
                arguments |= {"require_pretrained": True, "weights_only": True}
                with without_warnings(logging.ERROR):  # what goes wrong is in our own error
                    return open_clip.create_model(options.model, options.pretrained, **arguments)
            with without_warnings():  # that there are no weights
                arguments |= {"load_weights": False, "device": "meta"}
                return open_clip.create_model(options.model, **arguments)
        except (RuntimeError, OSError) as err:
            raise ValueError(
                f"scorer clip: expected weights for {options.model!r}, got {err} Give a local file "
                "as pretrained: PATH, or a folder as model: local-dir:PATH."
                + _file_of_openai(options.model)
            ) from err

    def tokenizer_of(self, options: Any) -> Any:
        """B prompts -> token ids."""
        return open_clip.get_tokenizer(options.model)

    def preprocessing(self) -> dict[str, Any]:
        """size, interpolation, resize_mode, mean and std of the images."""
        return dict(open_clip.get_model_preprocess_cfg(self.model))

    @property
    def activation(self) -> str:
        """QuickGELU or GELU, whichever the network runs: its weights do not tell."""
        quick = any(isinstance(module, QuickGELU) for module in self.model.modules())
        return "QuickGELU" if quick else "GELU"

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, *size) as open_clip's eval transform makes it, from images in [-1, 1].

        Values outside [-1, 1] stay: a clamp would stop their gradient.
        """
        height, width = images.shape[-2:]
        rows, cols = self.size
        if self.resize_mode == "shortest":
            scale = max(rows / height, cols / width)
            # A product such as 63.999... is 64.
            rows, cols = int(height * scale + 1e-6), int(width * scale + 1e-6)
        if (rows, cols) != (height, width):
            images = F.interpolate(
                images, (rows, cols), mode=self.interpolation, antialias=True, align_corners=False
            )
        top, left = round((rows - self.size[0]) / 2), round((cols - self.size[1]) / 2)
        images = images[..., top : top + self.size[0], left : left + self.size[1]]
        return (0.5 * images + 0.5 - self.mean) / self.std

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by: B prompts."""
        if isinstance(by, Tensor) or not all(isinstance(prompt, str) for prompt in by):
            raise ValueError(f"scorer {self.kind}: expected prompts as text, got something else.")
        with torch.no_grad():
            tokens = self.tokenizer(list(by)).to(images.device)
            text = self.model.encode_text(tokens, normalize=True)  # (B, D)
        pixels = self.model.encode_image(self.preprocess(images), normalize=True)
        return (pixels * text).sum(1)


def quick_gelu(model: str, pretrained: str | None) -> bool:
    """Whether the weights of that tag were trained with QuickGELU; False for a file or a folder.

    open_clip's create_model warns alone where the named model has the other activation.
    """
    known = open_clip.get_pretrained_cfg(model, pretrained) if pretrained is not None else {}
    return bool(known.get("quick_gelu", False))


def _file_of_openai(model: str) -> str:
    """A hint for messages that ask for a file; empty where no other model is to be named."""
    twin = f"{model}-quickgelu"
    if twin not in open_clip.list_models():
        return ""
    return f" For a file of OpenAI's weights, set model to {twin}."
