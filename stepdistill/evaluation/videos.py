"""Videos in an evaluation: which frames are looked at, and how much they move.

Frames go through the image networks one by one, so a distance between sets of frames says nothing
of their order. Two numbers do, and are read against the teacher's:

    motion            mean |difference| of neighbouring frames' 8-bit pixels in [0, 1], all frames
    frame_distance    mean Euclidean distance between the features of neighbouring seen frames

A student that freezes has less of both, one that flickers more.
"""

# B videos, F frames, K frames that are seen, C channels, H, W in px, D feature width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .pictured import text_of

DEFAULT_FRAMES = "4"
SHOWN_FRAMES = 6  # of a video in the report, at most


def check_video(options: Any, output: str, reads_image: bool) -> None:
    """Args: output: of the teacher's Family. reads_image: whether it needs one beside the prompt.

    Errors: ValueError for options of videos beside images, for a choice of frames other than first,
        all or a number above 0, and for first frames that are missing or not read.
    """
    if output == "audios":
        raise ValueError(
            f"evaluate: expected a pipeline that makes images or videos, got {options.teacher}, "
            "which makes sound. A run's own validation measures spectrograms."
        )
    if output == "images":
        for name in ("frames", "num_frames", *(() if reads_image else ("first_frames",))):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"{name}: expected it beside a pipeline that makes videos, got "
                    f"{options.teacher}, which makes images."
                )
    if reads_image != (options.first_frames is not None):
        expected = "no first frames beside"
        if reads_image:
            what = "first frames" if output == "frames" else "images to edit"
            expected = f"a folder of {what} for"
        raise ValueError(
            f"first_frames: expected {expected} {options.teacher}, got {options.first_frames!r}."
        )
    choice = options.frames or DEFAULT_FRAMES
    if choice not in ("first", "all") and not (choice.isdigit() and int(choice) > 0):
        raise ValueError(f"frames: expected first, all or a number of frames, got {choice!r}.")


def frames_text(choice: str) -> str:
    """For the protocol."""
    seen = f"{choice} at equal distances" if choice.isdigit() else choice
    return f"{seen}, each seen as an image; motion of all"


def frame_indices(choice: str, count: int) -> list[int]:
    """Which of `count` frames are seen: the first; all; or N at equal distances, first and last
    among them (all where there are no more)."""
    if choice == "first" or choice == "1" or count == 1:
        return [0]
    wanted = count if choice == "all" else min(int(choice), count)
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def shown_of(choice: str) -> int:
    """How many frames of a video the report shows, at most."""
    return {"first": 1, "all": SHOWN_FRAMES}.get(choice) or min(int(choice), SHOWN_FRAMES)


def look_at_videos(
    videos: Sequence[Sequence[Image.Image]],
    prompts: Sequence[Any],
    choice: str,
    look: Callable[[list[Image.Image], list[Any]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What `look` sees of the chosen frames, (B, K, ...) each, and motion (B,).

    Args: look: of images and as many prompts, rows by name.
    """
    chosen = frame_indices(choice, len(videos[0]))
    frames = [video[i] for video in videos for i in chosen]
    rows = look(frames, [text_of(prompt) for prompt in prompts for _ in chosen])
    features = {name: row.unflatten(0, (len(videos), len(chosen))) for name, row in rows.items()}
    features["motion"] = torch.stack([motion(video) for video in videos])
    return features


def motion(video: Sequence[Image.Image]) -> Tensor:
    """Mean absolute difference of neighbouring frames' pixels in [0, 1], 0-dimensional."""
    from .images import to_tensor

    pixels = to_tensor(video)  # (F, C, H, W)
    return (pixels[1:] - pixels[:-1]).abs().mean() if len(pixels) > 1 else torch.zeros(())


def frame_distance(features: Tensor) -> float | None:
    """Mean distance of neighbours in features (B, K, D); None for a single frame, and of images."""
    if features.ndim < 3 or features.shape[1] < 2:
        return None
    return float((features[:, 1:] - features[:, :-1]).double().norm(dim=-1).mean())


def per_frame(rows: Tensor) -> Tensor:
    """(B * K, D) of (B, K, D); (B, D) of images as they are."""
    return rows.flatten(0, -2)


def per_video(rows: Tensor) -> Tensor:
    """(B, K * D) whose Euclidean distances are root mean squares over frames; (B, D) of images as
    they are."""
    return rows.flatten(1) / rows.shape[1] ** 0.5 if rows.ndim == 3 else rows
