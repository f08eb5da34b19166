"""Feature networks: what distances between sets of images are measured in.

Anything with FeatureNet's attributes will do. Built in, by a text `kind:argument`:

    digits                      the demo's classifier (trained in seconds, nothing is downloaded)
    inception:FILE              Inception-v3 of the FID papers, through torch-fidelity
    clip:MODEL[,WEIGHTS]        image embedding of an open_clip model, folder or Hub id
    dino:DIR_OR_HUB_ID          class token of DINOv2 (or any such Transformers vision model)

Sources: Heusel et al. 2017, arXiv:1706.08500 (Inception); Kynkaanniemi et al. 2022,
arXiv:2203.06026 (CLIP); Stein et al. 2023, arXiv:2306.04675 (DINOv2).
"""

# B batch, C channels (1 or 3), H, W in px, D feature width

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.loading.safe_files import no_pickles, read_tensors

INCEPTION_SHA256 = "6726825d"  # beginning of the published file's hash, part of its name


class FeatureNet(Protocol):
    """name: short, for tables. told: its weights' hash and its preprocessing, for the protocol."""

    name: str
    told: dict[str, str]

    def preprocess(self, images: Tensor) -> Tensor:
        """The network's input, from images (B, C, H, W) in [0, 1] of eight bits."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 features of preprocessed images; no gradient."""
        ...


def feature_net(text: str, device: torch.device | str = "cpu") -> FeatureNet:
    """The built-in network of that text. Errors: ValueError for another kind or missing weights."""
    kind, _, argument = text.partition(":")
    if kind == "digits":
        from stepdistill.demo.classifier import DigitFeatures

        return DigitFeatures()
    made: dict[str, Any] = {
        "inception": InceptionFeatures,
        "clip": CLIPFeatures,
        "dino": DINOFeatures,
    }
    if kind not in made or not argument:
        raise ValueError(
            f"features: expected digits, inception:FILE, clip:MODEL[,WEIGHTS] or "
            f"dino:DIR_OR_HUB_ID, got {text!r}."
        )
    found: FeatureNet = made[kind](argument, device)
    return found


def network_sha256(net: nn.Module) -> str:
    """A hash of a network's state: names, shapes and values."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def clean_resize(images: Tensor, size: int) -> Tensor:
    """(B, C, size, size): Pillow's antialiased bicubic on float channels, as clean-fid does."""
    if images.shape[-2:] == (size, size):
        return images
    rows = []
    for image in images.cpu():
        channels = [
            Image.fromarray(c.numpy(), mode="F").resize((size, size), Image.Resampling.BICUBIC)
            for c in image * 255
        ]
        rows.append(torch.stack([torch.from_numpy(np.array(c)) for c in channels]))
    return torch.stack(rows).clamp(0, 255) / 255


class InceptionFeatures:
    """The 2048 pool features of the network of TensorFlow's FID code, ported by torch-fidelity.

    Args: weights: its published .pth file (known by its hash, read without running code) or the
        same tensors as .safetensors.
    Notes: images are resized to 299 px by `clean_resize`, so the network's own resize does nothing.
    """

    name = "inception"

    def __init__(self, weights: str, device: torch.device | str = "cpu") -> None:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ValueError(
                "features inception: expected the torch-fidelity package, got none. "
                'pip install "stepdistill[eval]"'
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = _inception_state(Path(weights))
        with tempfile.TemporaryDirectory() as scratch:  # its loader takes a path alone: ours
            file = Path(scratch) / "state.pth"
            torch.save(state, file)
            self.net = FeatureExtractorInceptionV3("inception", ["2048"], str(file)).to(device)
        self.device = torch.device(device)
        self.told = {
            "weights": network_sha256(self.net),
            "preprocess": "299 px, Pillow bicubic (clean-fid's filter, rounded to 8 bits)",
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, 299, 299) 8-bit; see FeatureNet."""
        resized = clean_resize(images, 299).expand(-1, 3, -1, -1)
        return (resized * 255).round().to(torch.uint8)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.net(pixels.to(self.device))[0]
        return features.flatten(1).float()


def _inception_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"features inception: expected a weights file, got {str(path)!r}.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise ValueError(
            f"features inception: expected .safetensors or the published file (sha256 "
            f"{INCEPTION_SHA256}...), got {path} ({digest[:8]}...). Pickled files can run code."
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class CLIPFeatures:
    """Image embeddings, not normalised, of an open_clip model. Args: text: MODEL[,WEIGHTS]."""

    name = "clip"

    def __init__(self, text: str, device: torch.device | str = "cpu") -> None:
        from stepdistill.rewards.clip import CLIPScorer

        model, _, weights = text.partition(",")
        options = CLIPScorer.read_options({"model": model, "pretrained": weights or None})
        CLIPScorer.check(options)
        self.scorer = CLIPScorer(options).to(device).eval().requires_grad_(False)
        self.told = {
            "weights": network_sha256(self.scorer.model),
            "preprocess": f"{self.scorer.size[0]} px, open_clip's ({self.scorer.interpolation})",
            "activation": self.scorer.activation,
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """See FeatureNet."""
        return self.scorer.preprocess(images.expand(-1, 3, -1, -1) * 2 - 1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.scorer.model.encode_image(pixels.to(self.scorer.mean.device))
        return features.float()


class DINOFeatures:
    """The class token after the last norm of a Transformers vision model.

    Args: model: folder or Hub id with safetensors and a preprocessor_config.json.
    """

    name = "dino"

    def __init__(self, model: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.processor = AutoImageProcessor.from_pretrained(model)
            with no_pickles("features dino"):
                net = AutoModel.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError) as err:
            raise ValueError(
                f"features dino: expected a folder or Hub id of a vision model in safetensors, got "
                f"{model!r}. {err}"
            ) from err
        self.net: Any = net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        steps = {k: v for k, v in self.processor.to_dict().items() if k in _PROCESSOR_FACTS}
        self.told = {"weights": network_sha256(self.net), "preprocess": str(steps)}

    def preprocess(self, images: Tensor) -> Tensor:
        """See FeatureNet."""
        pixels = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
        made: Tensor = self.processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        return made

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.net(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0]
        return features.float()


_PROCESSOR_FACTS = ("size", "crop_size", "resample", "do_center_crop", "image_mean", "image_std")
