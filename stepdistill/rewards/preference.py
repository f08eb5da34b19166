"""Models of human preference on CLIP: HPSv2 and PickScore (fine-tuned), and linear aesthetic heads.

Sources: Wu et al. 2023, arXiv:2306.09341 (HPSv2); Kirstain et al. 2023, arXiv:2305.01569
(PickScore, in the layout of transformers' CLIPModel); Schuhmann et al. 2022, arXiv:2210.08402,
Sec. 3 and appendix (LAION's aesthetic predictor on normalised CLIP image embeddings).
"""

# Shapes: B batch, H, W image size in px, D embedding width.

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from stepdistill.core.method import MethodConfig
from stepdistill.loading.place import is_hub_id
from stepdistill.loading.safe_files import no_pickles, read_tensors
from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.clip import CLIPScorer
from stepdistill.storage.files import read_json


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


# Of PickScore v1: a forecast asks no Hub.
_VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}


class PickOptions(MethodConfig):
    """PickScore v1, or any CLIPModel of transformers."""

    model: str = "yuvalkirstain/PickScore_v1"
    """Folder or Hub id of the CLIPModel, with safetensors weights."""


class Towers(nn.Module):
    """The two towers of a CLIPModel, called as open_clip's are."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """(B, D) of preprocessed images (B, 3, H, W)."""
        out = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(out, dim=1) if normalize else out

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """(B, D) of token ids (B, N)."""
        out = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return F.normalize(out, dim=1) if normalize else out


class PickScorer(CLIPScorer):
    """Cosine (B,) of an image and its prompt in PickScore's space; higher is preferred.

    Notes: without the temperature (about 100) that its authors multiply by. What follows the end
    of a text is not attended to, so padding doesn't matter.
    """

    kind: ClassVar[str] = "pickscore"
    Options: ClassVar[Any] = PickOptions

    @classmethod
    def check(cls, options: Any) -> None:
        """Errors: ValueError for what is neither a CLIPModel's folder nor a Hub id."""
        folder = Path(options.model)
        config = folder / "config.json"
        if folder.exists() or not is_hub_id(options.model):
            kind = read_json(config).get("model_type") if config.is_file() else None
            if kind != "clip" or not [*folder.glob("*.safetensors")]:
                raise ValueError(
                    "scorer pickscore: expected model to be the folder of a CLIPModel with "
                    f"safetensors weights, or a Hub id, got {options.model!r}. Fetch "
                    "yuvalkirstain/PickScore_v1 from the Hub."
                )

    def loaded(self, options: Any, weights: bool) -> Towers:
        """See CLIPScorer.loaded."""
        try:
            if not weights:
                here = Path(options.model).exists()
                config = CLIPConfig.from_pretrained(options.model) if here else CLIPConfig(**_VIT_H)
                return Towers(CLIPModel(config))
            with no_pickles("scorer pickscore"):
                return Towers(CLIPModel.from_pretrained(options.model, use_safetensors=True))
        except OSError as err:
            raise ValueError(
                f"scorer pickscore: expected the weights of {options.model!r}, got {err} Give "
                "their folder as model: PATH."
            ) from err

    def tokenizer_of(self, options: Any) -> Any:
        """See CLIPScorer.tokenizer_of: CLIP's own, which the Hub's folder leaves out."""
        length = self.model.clip.config.text_config.max_position_embeddings
        return open_clip.SimpleTokenizer(context_length=length)

    def preprocessing(self) -> dict[str, Any]:
        """See CLIPScorer.preprocessing: CLIP's."""
        clip = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        size = self.model.clip.config.vision_config.image_size
        return {**clip, "size": size, "interpolation": "bicubic", "resize_mode": "shortest"}


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
    judges_by = "nothing"
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

    def __init__(self, options: Any, weights: bool = True) -> None:
        super().__init__(options, weights)
        if weights:
            weight, bias = linear_head(read_tensors(options.head), options.head)
        else:
            weight, bias = torch.empty(self.model.visual.output_dim), torch.empty(())
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
