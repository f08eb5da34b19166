"""Feature networks: what distances between sets of images are measured in.

Anything with FeatureNet's attributes will do, named by a text:

    inception:FILE              Inception-v3 of the FID papers, through torch-fidelity
    clip:MODEL[,WEIGHTS]        image embedding of an open_clip model, folder or Hub id
    dino:DIR_OR_HUB_ID          class token of DINOv2 (or any such Transformers vision model)
    FOLDER                      any Transformers vision model (config.json and safetensors), or
                                what `stepdistill features train` made of your own images
    FILE.py:NAME, MODULE:NAME   what NAME(device) of a file or an importable module makes: your own
    other names                 of FEATURES, which others add to (the demo: digits)

Sources: Heusel et al. 2017, arXiv:1706.08500 (Inception); Kynkaanniemi et al. 2022,
arXiv:2203.06026 (CLIP); Stein et al. 2023, arXiv:2306.04675 (DINOv2).
"""

# B batch, C channels (1 or 3), H, W in px, D feature width

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from stepdistill.core.registry import from_file, is_file_class
from stepdistill.loading.safe_files import read_tensors
from stepdistill.rewards.vision import KIND, load_vision
from stepdistill.storage.files import one_line, read_json, sha256_of

from .images import clean_resize
from .learned import LearnedFeatures
from .store import network_sha256

INCEPTION_SHA256 = "6726825d"  # beginning of the published file's hash, part of its name


@runtime_checkable
class FeatureNet(Protocol):
    """name: short, for tables. facts: its weights' hash and its preprocessing, for the protocol."""

    name: str
    facts: dict[str, str]

    def preprocess(self, images: Tensor) -> Tensor:
        """The network's input, from images (B, C, H, W) in [0, 1] of eight bits."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 features of preprocessed images; no gradient."""
        ...


Device = torch.device | str


class Kind(NamedTuple):
    """Networks by one name. make: of the text's argument and a device; usage: such as dino:DIR."""

    usage: str
    make: Callable[[str, Device], FeatureNet]


def feature_net(text: str, device: Device = "cpu") -> FeatureNet:
    """The network of that text. Errors: ValueError for another text or missing weights."""
    name, _, argument = text.partition(":")
    if name in FEATURES and bool(argument) == (":" in FEATURES[name].usage):
        return FEATURES[name].make(argument, device)
    if (config := Path(text) / "config.json").is_file():
        if read_json(config).get("model_type") == KIND:
            return LearnedFeatures(text, device)
        return VisionFeatures(text, device, Path(text).resolve().name)
    if is_file_class(text):
        make, record = from_file(text, "features")
        return FileFeatures(_own(make, record["class"], record["file"], device), record["sha256"])
    if name not in FEATURES and argument.isidentifier() and _importable(name):
        try:
            make = getattr(importlib.import_module(name), argument, None)
        except Exception as err:
            got = f"{type(err).__name__}: {one_line(err)}"
            raise ValueError(f"features: expected module {name} to run, got {got}.") from err
        return _own(make, argument, f"module {name}", device)
    usages = sorted((kind.usage for kind in FEATURES.values()), key=lambda usage: ":" in usage)
    raise ValueError(
        f"features: expected {', '.join(usages)}, FILE.py:NAME, MODULE:NAME or a folder of a "
        f"vision model, got {text!r}."
    )


def _own(make: Any, name: str, where: str, device: Device) -> FeatureNet:
    """What a user's own name makes. Errors: ValueError where it makes no feature network."""
    got = repr(make)
    if callable(make):
        try:
            net = make(device)
        except Exception as err:
            got = f"{name}: {type(err).__name__}: {one_line(err)}"
        else:
            if isinstance(net, FeatureNet) and not isinstance(net, type):
                return net
            got = f"{name}, which makes {net!r}"
    raise ValueError(
        f"features: expected {name} in {where}, which makes a feature network of a device (name, "
        f"facts, preprocess, a call: evaluation/features.py), got {got}. Mend it."
    )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent that is not there; of no name
        return False


class FileFeatures:
    """A network of a user's file, known by the hash of its content too: features that are kept are
    of one content."""

    def __init__(self, net: FeatureNet, sha256: str) -> None:
        self.net, self.name, self.facts = net, net.name, {**net.facts, "code": sha256[:16]}

    def preprocess(self, images: Tensor) -> Tensor:
        """See FeatureNet."""
        return self.net.preprocess(images)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)


class InceptionFeatures:
    """The 2048 pool features of the network of TensorFlow's FID code, ported by torch-fidelity.

    Args: weights: its published .pth file (known by its hash, read without running code) or the
        same tensors as .safetensors.
    Notes: images are resized to 299 px by `clean_resize`, so the network's own resize does nothing.
    """

    name = "inception"

    def __init__(self, weights: str, device: Device = "cpu") -> None:
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
        self.facts = {
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
    digest = sha256_of(path)
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

    def __init__(self, text: str, device: Device = "cpu") -> None:
        from stepdistill.rewards.clip import CLIPScorer

        model, _, weights = text.partition(",")
        options = CLIPScorer.read_options({"model": model, "pretrained": weights or None})
        CLIPScorer.check(options)
        self.scorer = CLIPScorer(options).to(device).eval().requires_grad_(False)
        self.facts = {
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


class VisionFeatures:
    """A Transformers vision model: its pooled output, or (of one without, and of DINO) the class
    token after the last norm.

    Args: model: folder or Hub id with safetensors. Without a preprocessor_config.json, images come
        at the side that its config states, in [-1, 1], with a warning.
    """

    def __init__(self, model: str, device: Device = "cpu", name: str = "dino") -> None:
        self.name = name
        net, self.processor = load_vision(model, f"features {name}")
        self.net: Any = net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        steps = {k: v for k, v in self.processor.to_dict().items() if k in _PROCESSOR_FACTS}
        self.facts = {"weights": network_sha256(self.net), "preprocess": str(steps)}

    def preprocess(self, images: Tensor) -> Tensor:
        """See FeatureNet."""
        pixels = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
        made: Tensor = self.processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        return made

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        output = self.net(pixel_values=pixels.to(self.device))
        pooled = None if self.name == "dino" else output.get("pooler_output")
        features: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return features.float()


_PROCESSOR_FACTS = ("size", "crop_size", "resample", "do_center_crop", "image_mean", "image_std")

# By name; `FEATURES["mine"] = Kind("mine:FILE", Mine)` adds one.
FEATURES = {
    "inception": Kind("inception:FILE", InceptionFeatures),
    "clip": Kind("clip:MODEL[,WEIGHTS]", CLIPFeatures),
    "dino": Kind("dino:DIR_OR_HUB_ID", VisionFeatures),
}
