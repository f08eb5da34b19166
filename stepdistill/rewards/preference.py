"""Models of human preference on CLIP: HPSv2 (a fine-tuned CLIP) and linear aesthetic heads.

Sources: Wu et al. 2023, arXiv:2306.09341 (HPSv2); Schuhmann et al. 2022, arXiv:2210.08402, Sec. 3
and appendix (LAION's aesthetic predictor on normalised CLIP image embeddings).
"""

# Shapes: B batch, H, W image size in px, D embedding width.

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.loading.safe_files import read_tensors
from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.clip import CLIPScorer


class HPSOptions(CLIPOptions):
    """Human preference score v2."""

    model: str = "ViT-H-14"
    """open_clip model that the weights are of."""
    pretrained: str | None = None
    """Local file of HPSv2 or v2.1 (HPS_v2.1_compressed); required."""


class HPSScorer(CLIPScorer):
    """Cosine (B,) of an image and its prompt in HPSv2's space; higher is preferred.

    Notes: images that are not square are cropped to the middle; the authors' code pads them.
    """

    kind: ClassVar[str] = "hps"
    Options: ClassVar[type[CLIPOptions]] = HPSOptions

    @classmethod
    def check(cls, options: CLIPOptions) -> None:
        """Errors: ValueError without the file."""
        if options.pretrained is None or not Path(options.pretrained).is_file():
            raise ValueError(
                f"scorer hps: expected pretrained to be a local file of HPSv2's weights, got "
                f"{options.pretrained!r}. Fetch xswu/HPSv2 from the Hub."
            )
        super().check(options)


class AestheticOptions(CLIPOptions):
    """Aesthetic score of an image alone."""

    model: str = "ViT-L-14-quickgelu"
    """open_clip model whose embeddings the head reads; LAION's heads read OpenAI's ViT-L/14, which
    has QuickGELU."""
    pretrained: str | None = "openai"
    """Its weights: a tag or a local file. A file of OpenAI's needs a model named -quickgelu."""
    head: str
    """Safetensors file of the head: one linear layer, or several without anything in between
    (the "improved" predictor), as weights (out, in) and biases in the order of their names."""


class AestheticScorer(CLIPScorer):
    """Linear head (B,) on the normalised image embedding; LAION's run from 1 to 10."""

    kind: ClassVar[str] = "aesthetic"
    Options: ClassVar[type[CLIPOptions]] = AestheticOptions
    weight: Tensor
    bias: Tensor

    @classmethod
    def check(cls, options: Any) -> None:
        """Errors: ValueError for a missing or pickled head."""
        file = Path(options.head)
        if file.suffix != ".safetensors" or not file.is_file():
            raise ValueError(
                f"scorer aesthetic: expected head to be a .safetensors file, got {options.head!r}. "
                "Convert a pickled one with safetensors.torch.save_file."
            )
        super().check(options)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        weight, bias = linear_head(read_tensors(options.head), options.head)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by is not looked at."""
        embedded = self.model.encode_image(self.preprocess(images), normalize=True)  # (B, D)
        if embedded.shape[1] != len(self.weight):
            raise ValueError(
                f"scorer aesthetic: expected a head for width {embedded.shape[1]}, got "
                f"{len(self.weight)}. Set the model that the head was fitted on."
            )
        return embedded @ self.weight + self.bias


def linear_head(state: dict[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """(weight (D,), bias ()) of one linear layer, or of several folded into one.

    Errors: ValueError where the tensors are no chain of layers that ends in one number.
    """
    names = sorted((n for n in state if n.endswith("weight")), key=_number)
    folded: Tensor | None = None
    offset = torch.zeros(1)
    try:
        for name in names:
            weight = state[name].float()
            bias = state[name.removesuffix("weight") + "bias"].float()
            offset = weight @ offset + bias if folded is not None else bias
            folded = weight if folded is None else weight @ folded
    except (KeyError, RuntimeError) as err:
        raise ValueError(f"{where}: expected linear layers in order, got {err}.") from err
    if folded is None or folded.shape[0] != 1:
        got = None if folded is None else tuple(folded.shape)
        raise ValueError(f"{where}: expected layers that end in one number, got {got}.")
    return folded[0], offset[0]


def _number(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]
