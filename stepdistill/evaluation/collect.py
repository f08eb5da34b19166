"""Fills a store: draws images or reads them, and keeps features, scores and costs alone.

Image i is of prompt i // K at draw i % K and has a generator of its own, keyed by (seed, prompt,
draw): neither batch size nor the number of processes changes it.
"""

# B batch, F frames, C channels, H, W in px, D feature width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.context import stable_seed
from stepdistill.core.method import Scorer
from stepdistill.reporting.values import counted
from stepdistill.storage.files import one_line

from .features import FeatureNet
from .images import Frame, eight_bit, open_image, pixel_statistics, to_tensor
from .memory import PeakMemory
from .samples import PipelineSampler
from .store import Store
from .videos import SHOWN_FRAMES, frame_indices, look_at_videos

PREVIEW_PX = 256


@dataclass(frozen=True)
class Lens:
    """What images are looked at with. scorers: by name, objects with Scorer's signature."""

    nets: Sequence[FeatureNet]
    scorers: Mapping[str, Scorer]
    frame: Frame

    def look(
        self, images: Sequence[Image.Image], prompts: Sequence[Any] | None
    ) -> dict[str, Tensor]:
        """Rows of features, pixel statistics and (where there are prompts) scores."""
        framed = to_tensor([self.frame(image) for image in images])
        features = {
            f"features/{net.name}": net(net.preprocess(framed)).cpu().float() for net in self.nets
        }
        if prompts is None:  # real images, which may differ in size: they are seen framed alone
            return {**features, "pixels": pixel_statistics(framed)}
        pixels = to_tensor(images)
        features["pixels"] = pixel_statistics(pixels)
        for name, scorer in self.scorers.items():
            with torch.no_grad():
                score = scorer(_on(scorer, pixels.expand(-1, 3, -1, -1) * 2 - 1), list(prompts))
            features[f"score/{name}"] = score.cpu().float()
        return features

    def try_nets(self, image: Image.Image) -> None:
        """Errors: ValueError naming a network that can't be given such an image."""
        framed = to_tensor([self.frame(image)] * 2)
        for net in self.nets:
            try:
                shape = tuple(net(net.preprocess(framed)).shape)
            except ValueError:
                raise
            except Exception as err:  # of a user's own network, or of a library
                raise ValueError(
                    f"features {net.name}: expected a network of images {tuple(framed.shape[1:])}, "
                    f"got {type(err).__name__}: {one_line(err)}. Set size_px, or name another."
                ) from err
            if len(shape) != 2 or shape[0] != 2:
                raise ValueError(
                    f"features {net.name}: expected (2, D) features of two images, got {shape}."
                )


def _on(scorer: Scorer, images: Tensor) -> Tensor:
    if isinstance(scorer, torch.nn.Module):
        tensors = [*scorer.parameters(), *scorer.buffers()]
        return images.to(tensors[0].device) if tensors else images
    return images


@dataclass(frozen=True)
class Drawing:
    """How many images of what. prompts: one each; `None` for unconditional models; num_previews:
    images (or videos) shown; frames: which of a video are seen (see videos.frame_indices), None of
    images."""

    prompts: Sequence[Any]
    per_prompt: int
    seed: int
    batch_size: int
    num_previews: int
    frames: str | None = None

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def prompt(self, index: int) -> Any:
        return self.prompts[index // self.per_prompt]

    def generator(self, index: int) -> torch.Generator:
        prompt, draw = divmod(index, self.per_prompt)
        return torch.Generator().manual_seed(stable_seed("evaluate", self.seed, prompt, draw))


def preview_indices(drawing: Drawing) -> list[int]:
    """Images of the grid: of as many prompts as there are, then more of each."""
    prompts, per = len(drawing.prompts), drawing.per_prompt
    by_draw = [p * per + k for k in range(per) for p in range(prompts)]
    return sorted(by_draw[: drawing.num_previews])


def draw_into(
    store: Store,
    load: Callable[[], PipelineSampler],
    drawing: Drawing,
    lens: Lens,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """Make this process's missing shards; a pipeline is loaded only where there are any.

    Args: tell: called with the number of images made, after each batch.
    """
    shards = store.missing(rank, world_size)
    if not shards:
        return
    sampler, shown = load(), set(preview_indices(drawing))
    device = next(sampler.nets[0].parameters()).device
    peak, warm = PeakMemory(device), False
    for shard in shards:
        rows: list[dict[str, Tensor]] = []
        batches: list[tuple[int, float]] = []
        calls, size = 0.0, ""
        for first in range(shard.start, shard.stop, drawing.batch_size):
            numbers = range(first, min(first + drawing.batch_size, shard.stop))
            prompts = [drawing.prompt(i) for i in numbers]
            made = sampler.draw(prompts, [drawing.generator(i) for i in numbers])
            batches.append((len(numbers), made.seconds if warm else -made.seconds))
            warm, calls = True, made.network_calls
            size = "{1} x {0} px".format(*made.images.shape[-2:])
            seen = [index if index in shown else None for index in numbers]
            rows.append(_looked(made.images, prompts, drawing.frames, lens, seen, store.folder))
            tell(len(numbers))
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        facts = {"batches": batches, "network_calls": calls, "size": size}
        facts |= {"batch_size": max(count for count, _ in batches), "device": device_text(device)}
        store.write(shard, tensors, {**facts, "peak_gib": peak.gib, "peak_of": peak.kind})


def device_text(device: torch.device) -> str:
    """Its model, beside which a time means something."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {counted(threads, 'thread')}"


def _looked(
    made: Tensor,
    prompts: Sequence[Any],
    frames: str | None,
    lens: Lens,
    shown: Sequence[int | None],
    folder: Path,
) -> dict[str, Tensor]:
    """Rows of images (B, C, H, W) or videos (B, F, C, H, W) in [-1, 1].

    Args: shown: for each the number that its preview is saved under, or None.
    """
    if not bool(torch.isfinite(made).all()):
        raise FloatingPointError(
            "expected finite images, got NaN or infinity. In fp16 try --dtype bf16 or float32; "
            "else the student is broken: leave it out"
        )
    if frames is None:
        images = eight_bit((made.permute(0, 2, 3, 1) + 1) / 2)
        for index, image in zip(shown, images, strict=True):
            if index is not None:
                save_preview(image, folder, index)
        return lens.look(images, prompts)
    videos = [eight_bit((video.permute(0, 2, 3, 1) + 1) / 2) for video in made]
    for index, video in zip(shown, videos, strict=True):
        if index is not None:
            chosen = frame_indices(frames, len(video))
            some = frame_indices(str(SHOWN_FRAMES), len(chosen))
            for place, at in enumerate(some):
                save_preview(video[chosen[at]], folder, index, place)
    return look_at_videos(videos, prompts, frames, lens.look)


def read_into(
    store: Store,
    files: Sequence[Path],
    lens: Lens,
    batch_size: int,
    num_previews: int,
    rank: int = 0,
    world_size: int = 1,
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """The same for real images of a folder."""
    for shard in store.missing(rank, world_size):
        rows = []
        for first in range(shard.start, shard.stop, batch_size):
            numbers = range(first, min(first + batch_size, shard.stop))
            images = [lens.frame(open_image(files[i])) for i in numbers]
            seen = Lens(lens.nets, {}, Frame())  # framed already: sizes may differ before
            rows.append(seen.look(images, None))
            for index, image in zip(numbers, images, strict=True):
                if index < num_previews:
                    save_preview(image, store.folder, index)
            tell(len(numbers))
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        store.write(shard, tensors, {})


def save_preview(image: Image.Image, folder: Path, index: int, frame: int = 0) -> None:
    """A PNG of at most PREVIEW_PX; its name is the image's number, never its prompt.

    Args: frame: place among a video's shown frames.
    """
    small = image.copy()
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    small.save(folder / preview_name(index, frame))


def preview_name(index: int, frame: int = 0) -> str:
    """Of that file."""
    return f"preview_{index:07d}{f'_{frame}' if frame else ''}.png"
