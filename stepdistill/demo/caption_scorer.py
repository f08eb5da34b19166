"""A small judge of how well a picture fits its caption: what the demos' scorers share.

An image and a text tower are trained on the demo's pictures and captions by CLIP's contrast: of the
captions there are, which one is the picture's? A demo has two of them: one to train with, and one
to keep out. They see different halves of the training pictures and begin at different seeds, so
what pleases the one alone is no better picture. Neither is the network that Frechet distance is
taken in, and the judge's pictures are seen by none.
"""

# Shapes: B batch, C channels, H, W image size in px, D embedding width, N words.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.core.method import MethodConfig
from stepdistill.rewards.base import FrozenScorer

WIDTH = 32
TEMPERATURE = 0.1  # of cosines in the contrast


class CaptionScorer(FrozenScorer):
    """Cosine (B,) of a picture and its prompt; higher fits better.

    part: which half of the training pictures, and the seed. size: H = W. example: of a prompt.
    epochs: of its training.
    """

    Options: ClassVar[type[MethodConfig]] = MethodConfig
    part: ClassVar[int]
    size: ClassVar[int]
    example: ClassVar[str]
    epochs: ClassVar[int] = 10

    def __init__(self, options: Any, weights: bool = True) -> None:
        super().__init__(options)
        self.words = {word: i for i, word in enumerate(self.vocabulary())}
        with torch.random.fork_rng(devices=[]):  # a run's draws stay as they were
            self.image = self.tower()
            self.text = nn.EmbeddingBag(len(self.words), WIDTH)
        if weights:
            self.load_state_dict(_trained(type(self)))

    @abstractmethod
    def tower(self) -> nn.Module:
        """Makes (B, D) of images as `seen` gives them."""

    @classmethod
    @abstractmethod
    def vocabulary(cls) -> list[str]:
        """The words of all captions."""

    @classmethod
    @abstractmethod
    def pictures(cls) -> tuple[Tensor, Callable[[], list[str]]]:
        """Its half of the training pictures as the tower takes them, and a caption for each, drawn
        anew where one has several."""

    def seen(self, images: Tensor) -> Tensor:
        """What the tower is given of images (B, 3, H, W)."""
        return images

    def tokens(self, prompts: Any) -> tuple[Tensor, Tensor]:
        """Numbers of all words, and where each prompt's begin. Errors: ValueError for a word of no
        caption."""
        device = self.text.weight.device
        try:
            rows = [[self.words[word] for word in prompt.split()] for prompt in prompts]
        except (KeyError, AttributeError) as err:
            raise ValueError(
                f"scorer {self.kind}: expected prompts such as {self.example!r}, got {err}."
            ) from err
        starts = torch.tensor([0, *map(len, rows)][:-1], device=device).cumsum(0)
        return torch.tensor([word for row in rows for word in row], device=device), starts

    def embedded(self, images: Tensor) -> Tensor:
        """(B, D) of what `seen` gives."""
        return F.normalize(self.image(images), dim=1)

    def captions(self, prompts: Any) -> Tensor:
        """(B, D) of B prompts."""
        return F.normalize(self.text(*self.tokens(prompts)), dim=1)

    def score(self, images: Tensor, by: Any) -> Tensor:
        """See FrozenScorer.score; by: B prompts."""
        if images.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"scorer {self.kind}: expected images of {self.size} x {self.size} px, got "
                f"{tuple(images.shape[2:])}. Name another kind."
            )
        return (self.embedded(self.seen(images)) * self.captions(by)).sum(1)


@cache
def _trained(cls: type[CaptionScorer]) -> dict[str, Tensor]:
    """The weights of that judge, trained once a process; global randomness stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(cls.part)
        fit(scorer := cls(MethodConfig(), weights=False), *cls.pictures(), cls.epochs)
    return {name: value.detach() for name, value in scorer.state_dict().items()}


def fit(
    scorer: CaptionScorer,
    images: Tensor,
    captions: Callable[[], Sequence[str]],
    epochs: int,
    batch_size: int = 64,
) -> None:
    """Train its towers: which of a batch's captions is the picture's?"""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(epochs):
        drawn = captions()
        for index in torch.randperm(len(images)).split(batch_size):
            texts = [drawn[k] for k in index.tolist()]
            known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            cosines = scorer.embedded(images[index]) @ scorer.captions([*known]).T
            targets = torch.tensor([known[text] for text in texts])
            loss = F.cross_entropy(cosines / TEMPERATURE, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
