"""A small digit classifier: the demo's feature network and its judge of class accuracy.

Trained on the real training images only, in a few seconds. Its penultimate activations are the
features in which Frechet distance and recall are measured, as Inception's are for photographs.
"""

# B batch, N images, D feature width, K classes

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.evaluation.features import FEATURES, Kind, network_sha256

from .data import DIGIT_NAMES, IMAGE_PX, Split, load_digit_splits

FEATURE_WIDTH = 64


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers; `features` is the layer before the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(32 * (IMAGE_PX // 2) ** 2, FEATURE_WIDTH),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURE_WIDTH, len(DIGIT_NAMES))

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) logits of (B, 1, 8, 8) images in [-1, 1]."""
        logits: Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, D) penultimate activations, in evaluation mode."""
        self.eval()
        features: Tensor = self.body(images)
        return features

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of (N, 1, 8, 8) images whose predicted class is the label (N,)."""
        self.eval()
        return float((self(images).argmax(1) == labels).double().mean())


def train_classifier(
    train: Split, epochs: int = 10, batch_size: int = 64, seed: int = 0
) -> DigitClassifier:
    """A classifier fitted to `train` with AdamW on a cosine learning rate.

    Notes: stopped early and without label smoothing on purpose. Longer training collapses each
           class to a point (test accuracy .99, but features that no longer see blur): Frechet
           distance of noisy or blurred digits over the floor is largest near ten epochs.
           Global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
        steps = epochs * -(-len(train) // batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(epochs):
            for index in torch.randperm(len(train)).split(batch_size):
                loss = F.cross_entropy(model(train.images[index]), train.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


class DigitFeatures:
    """The classifier as a feature network of `stepdistill evaluate`; trained here, in seconds."""

    name = "digits"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.model = train_classifier(load_digit_splits().train)
        self.facts = {
            "weights": network_sha256(self.model),
            "preprocess": "8 x 8 px, grey, as made",
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1]. Errors: ValueError for images of another shape."""
        if images.shape[1:] != (1, IMAGE_PX, IMAGE_PX):
            raise ValueError(
                f"features digits: expected grey images of 8 x 8 px, got {tuple(images.shape[1:])}."
                " Choose another feature network."
            )
        return images * 2 - 1

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.model.features(pixels)


def register_digits() -> None:
    """Let `--features digits` name it."""
    FEATURES["digits"] = Kind("digits", lambda _, device: DigitFeatures(device))
