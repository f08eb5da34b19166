"""The demo's data: 1,797 real handwritten digits of 8x8 pixels, each with a prompt.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), the test part
shipped inside scikit-learn, so nothing is downloaded.
"""

# N images

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.reporting.values import counted

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_PX = 8


def prompt_for(label: int) -> str:
    """The prompt of one digit class, such as "a handwritten seven"."""
    return f"a handwritten {DIGIT_NAMES[label]}"


def prompts_for(labels: Tensor) -> list[str]:
    """One prompt for each label of a (N,) integer tensor."""
    return [prompt_for(int(label)) for label in labels]


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) float32 in [-1, 1] and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prompts(self) -> list[str]:
        """One prompt for each image."""
        return prompts_for(self.labels)


@dataclass(frozen=True)
class Digits:
    """Two disjoint, stratified parts: `train` for every network, `heldout` for judging."""

    train: Split
    heldout: Split


def load_digit_splits(heldout_fraction: float = 0.3, seed: int = 0) -> Digits:
    """The digits as a stratified train / held-out split.

    Args: heldout_fraction: share of EACH class that no network ever trains on; seed: of the split.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction: expected a share in (0, 1), got {heldout_fraction}. Try 0.3."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn. Install it: pip install 'stepdistill[demo]'"
        ) from error
    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.float32))[:, None] / 8 - 1  # 0..16 -> [-1, 1]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    train, heldout = [], []
    for label in range(len(DIGIT_NAMES)):
        index = (labels == label).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=generator)]
        count = round(heldout_fraction * len(index))
        heldout.append(index[:count])
        train.append(index[count:])
    return Digits(*(_take(images, labels, parts, generator) for parts in (train, heldout)))


def _take(images: Tensor, labels: Tensor, parts: list[Tensor], generator: torch.Generator) -> Split:
    index = torch.cat(parts)
    index = index[torch.randperm(len(index), generator=generator)]  # classes mixed
    return Split(images[index], labels[index])


def stratified_subset(split: Split, like: Tensor, seed: int) -> Split:
    """Images of `split` drawn without replacement, with the class counts of the labels `like`.

    Raises: ValueError where `split` has fewer images of a class than `like` asks for.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for label, count in zip(*like.unique(return_counts=True), strict=True):
        index = (split.labels == label).nonzero().flatten()
        if len(index) < int(count):
            raise ValueError(
                f"split: expected at least {counted(int(count), 'image')} of class {int(label)}, "
                f"got {len(index)}. Ask for fewer images."
            )
        parts.append(index[torch.randperm(len(index), generator=generator)[: int(count)]])
    return _take(split.images, split.labels, parts, generator)


def write_image_folder(split: Split, folder: Path) -> None:
    """The split as PNG files with metadata.jsonl, the layout `--data.train_data_dir` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((split.images + 1) * 127.5).round().byte().squeeze(1).numpy()  # (N, 8, 8)
    lines = []
    for index, (picture, label) in enumerate(zip(pixels, split.labels.tolist(), strict=True)):
        name = f"{index:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": prompt_for(label)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_data(split: Split, folder: Path) -> Path:
    """See `write_image_folder`; beside the images prompts.txt, a prompt of each class, whose path
    it returns."""
    write_image_folder(split, folder)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt_for(k)}\n" for k in range(len(DIGIT_NAMES))))
    return prompts
