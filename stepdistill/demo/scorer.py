"""Two small judges of how well a digit fits its prompt: one to train with, one to keep out.

Each is an image and a text tower trained on the demo's pictures and captions by CLIP's contrast: of
the captions there are, which one is the picture's? They see different halves of the training
pictures and begin at different seeds, so what pleases the one alone is no better digit. Neither is
the network that Frechet distance is taken in, and the held-out pictures are seen by none.
"""

# Shapes: B batch, H, W image size in px, D embedding width, N words.

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.core.method import MethodConfig
from stepdistill.demo.data import IMAGE_PX, Split, load_digit_splits
from stepdistill.rewards import SCORERS
from stepdistill.rewards.base import FrozenScorer

WIDTH = 32
TEMPERATURE = 0.1  # of cosines in the contrast


class DigitScorer(FrozenScorer):
    """Cosine (B,) of a digit and its prompt; higher fits better."""

    kind: ClassVar[str] = "digits"
    Options: ClassVar[type[MethodConfig]] = MethodConfig
    part: ClassVar[int] = 0  # which half of the training pictures, and the seed

    def __init__(self, options: Any, weights: bool = True) -> None:
        super().__init__(options)
        self.words = {word: i for i, word in enumerate(vocabulary())}
        with torch.random.fork_rng(devices=[]):  # a run's draws stay as they were
            self.image = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.GELU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * (IMAGE_PX // 2) ** 2, WIDTH),
            )
            self.text = nn.EmbeddingBag(len(self.words), WIDTH)
        if weights:
            self.load_state_dict(_trained(type(self)))

    def tokens(self, prompts: Any) -> Tensor:
        """(B, N) numbers of words. Errors: ValueError for a word of no caption."""
        device = self.text.weight.device
        try:
            rows = [[self.words[word] for word in prompt.split()] for prompt in prompts]
            return torch.tensor(rows, device=device)
        except (KeyError, ValueError, AttributeError) as err:
            raise ValueError(
                f"scorer {self.kind}: expected prompts such as 'a handwritten seven', got {err}."
            ) from err

    def embedded(self, images: Tensor) -> Tensor:
        """(B, D) of (B, 1, H, W) in [-1, 1]."""
        return F.normalize(self.image(images), dim=1)

    def captions(self, prompts: Any) -> Tensor:
        """(B, D) of B prompts."""
        return F.normalize(self.text(self.tokens(prompts)), dim=1)

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by: B prompts."""
        if images.shape[2:] != (IMAGE_PX, IMAGE_PX):
            raise ValueError(
                f"scorer {self.kind}: expected digits of {IMAGE_PX} x {IMAGE_PX} px, got "
                f"{tuple(images.shape[2:])}. Name another kind."
            )
        return (self.embedded(images.mean(1, keepdim=True)) * self.captions(by)).sum(1)


class HeldOutDigitScorer(DigitScorer):
    """The judge that is kept out of training."""

    kind: ClassVar[str] = "digits_held_out"
    part: ClassVar[int] = 1


def vocabulary() -> list[str]:
    """The words of all captions."""
    with torch.device("cpu"):  # a forecast makes what it makes on another
        prompts = set(load_digit_splits().train.prompts)
    return sorted({word for prompt in prompts for word in prompt.split()})


@cache
def _trained(cls: type[DigitScorer]) -> dict[str, Tensor]:
    """The weights of that judge, trained in a second or two; global randomness stays as it was."""
    train = load_digit_splits().train
    half = Split(train.images[cls.part :: 2], train.labels[cls.part :: 2])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(cls.part)
        fit(scorer := cls(MethodConfig(), weights=False), half)
    return {name: value.detach() for name, value in scorer.state_dict().items()}


def fit(scorer: DigitScorer, split: Split, epochs: int = 10, batch_size: int = 64) -> None:
    """Train its towers: which caption is the picture's?"""
    captions = sorted(set(split.prompts))
    number = {caption: i for i, caption in enumerate(captions)}
    targets = torch.tensor([number[prompt] for prompt in split.prompts])
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(split)).split(batch_size):
            cosines = scorer.embedded(split.images[index]) @ scorer.captions(captions).T
            loss = F.cross_entropy(cosines / TEMPERATURE, targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def register_scorers() -> None:
    """Let rewards name them."""
    for cls in (DigitScorer, HeldOutDigitScorer):
        SCORERS[cls.kind] = f"{cls.__module__}:{cls.__name__}"
