"""A judge without a person: a small image-text network, trained on real pictures alone.

Does a picture show what its narrow caption says? The right caption's embedding lies nearest to the
picture's, among 20. How far is a set of pictures from the real ones under wide captions? Its
picture features measure Frechet distance and recall. No teacher or student is trained with it.

Source of the loss: Radford et al. 2021, arXiv:2103.00020, figure 3.
"""

# B batch, N pictures, D feature width

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.evaluation.features import FEATURES, Kind, network_sha256

from .captions import TELL_STYLE, Entry, caption
from .data import IMAGE_PX, SHIPPED, VARIANTS, Emoji

FEATURE_WIDTH = 64
CANDIDATES = 20
JUDGE_FILE = SHIPPED / "judge.safetensors"
_HELD_BACK = VARIANTS - 1  # this variant of each picture is never trained on: what real ones score


class Retrieval(nn.Module):
    """Pictures and captions in one space. Args: words: those that captions are read by."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = {word: index for index, word in enumerate(words)}
        layers: list[nn.Module] = []
        for wide, narrow in ((3, 24), (24, 48), (48, 96), (96, 128)):  # 64 px to 4 px
            layers += [nn.Conv2d(wide, narrow, 4, 2, 1), nn.GroupNorm(1, narrow), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, FEATURE_WIDTH))
        self.embedding = nn.EmbeddingBag(len(words), 64, mode="sum")
        self.text = nn.Sequential(nn.SiLU(), nn.Linear(64, FEATURE_WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def features(self, images: Tensor) -> Tensor:
        """(B, D) of (B, 3, 64, 64) in [-1, 1]."""
        features: Tensor = self.body(images)
        return features

    def read(self, captions: Sequence[str]) -> Tensor:
        """(B, D) of captions; words that it does not know are passed over."""
        rows = [[self.words[w] for w in text.split() if w in self.words] for text in captions]
        offsets = torch.tensor([0, *map(len, rows)])[:-1].cumsum(0)
        flat = torch.tensor([index for row in rows for index in row], dtype=torch.long)
        features: Tensor = self.text(self.embedding(flat, offsets))
        return features

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(B, B) scores of each picture with each caption."""
        pictures, texts = self.features(images), self.read(captions)
        return self.log_scale.exp() * F.normalize(pictures) @ F.normalize(texts).T

    def save(self, path: Path) -> None:
        """Write weights (bf16) and words to one safetensors file."""
        state = {name: value.bfloat16() for name, value in self.state_dict().items()}
        save_file(state, path, {"words": json.dumps([*self.words])})

    @staticmethod
    def load(path: Path) -> Retrieval:
        """The network that `save` wrote."""
        with safe_open(path, "pt") as file:
            words = json.loads(file.metadata()["words"])
        net = Retrieval(words)
        net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return net.eval().requires_grad_(False)


def train_retrieval(
    emoji: Emoji, pictures: int = 150_000, batch_size: int = 128, seed: int = 0
) -> Retrieval:
    """A network trained on the real pictures, held-out combinations among them: it must know them
    to tell whether a teacher that does not know them draws them.

    Notes: global random state is left as it was.
    """
    words = sorted({word for entry in emoji.entries for word in caption(entry).split()})
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Retrieval(words).train()
    steps, weights = -(-pictures // batch_size), emoji.weights(of_all=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for _ in range(steps):
        index = torch.multinomial(weights, batch_size, True, generator=generator)
        variant = torch.randint(_HELD_BACK, (batch_size,), generator=generator)
        texts = [
            caption(emoji.entries[k], style=draw.random() < TELL_STYLE) for k in index.tolist()
        ]
        # Equal captions of a batch are right for each other's pictures.
        right = torch.tensor([[float(one == other) for other in texts] for one in texts])
        right = right / right.sum(1, keepdim=True)
        scores = net(emoji.images(variant, index), texts)
        loss = F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def right_caption_first(
    net: Retrieval, images: Tensor, shown: Sequence[Entry], among: Sequence[Entry], seed: int = 0
) -> Tensor:
    """(N,) whether each picture's full caption scores highest of CANDIDATES.

    Args: images (N, 3, 64, 64); shown: what each should show; among: where the others are drawn.
    """
    draw, pictures = random.Random(seed), F.normalize(net.features(images))
    captions, found = sorted({caption(entry) for entry in among}), []
    for picture, entry in zip(pictures, shown, strict=True):
        right = caption(entry)
        drawn = draw.sample(captions, min(CANDIDATES, len(captions)))
        others = [text for text in drawn if text != right][: CANDIDATES - 1]
        scores = F.normalize(net.read([right, *others])) @ picture
        found.append(bool(scores.argmax() == 0))
    return torch.tensor(found)


def real_score(net: Retrieval, emoji: Emoji, count: int = 500, seed: int = 0) -> float:
    """`right_caption_first` of real pictures as it never saw them: the most that one can expect."""
    index = torch.randperm(len(emoji.entries), generator=torch.Generator().manual_seed(seed))[
        :count
    ]
    shown = [emoji.entries[k] for k in index.tolist()]
    images = emoji.images(_HELD_BACK, index)
    return float(right_caption_first(net, images, shown, emoji.entries, seed).double().mean())


class EmojiFeatures:
    """The judge's picture features as a feature network of `stepdistill evaluate`."""

    name = "emoji"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if not JUDGE_FILE.is_file():
            raise ValueError(
                f"features emoji: expected {JUDGE_FILE}, got none. Make it: "
                "stepdistill demo teacher."
            )
        self.net = Retrieval.load(JUDGE_FILE)
        self.facts = {"weights": network_sha256(self.net), "preprocess": f"{IMAGE_PX} px, as made"}

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1]. Errors: ValueError for images of another shape."""
        if images.shape[1:] != (3, IMAGE_PX, IMAGE_PX):
            raise ValueError(
                f"features emoji: expected colour images of {IMAGE_PX} x {IMAGE_PX} px, got "
                f"{tuple(images.shape[1:])}. Choose another feature network."
            )
        return images * 2 - 1

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.net.features(pixels)


def register_emoji() -> None:
    """Let `--features emoji` name it."""
    FEATURES["emoji"] = Kind("emoji", lambda _, device: EmojiFeatures(device))
