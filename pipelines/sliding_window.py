"""Videos longer than a model's own: clips of an image-to-video pipeline, chained by pixels.

Clip k + 1 begins with the last frame of clip k, as a picture: a latent in the middle of a clip
holds four frames and was made knowing those before it, so it is not what the encoder makes of one.
The frame that two clips share is shown once. Noise is drawn anew for each clip from one generator.
Each seam goes through the decoder and the encoder, and their errors add up: textures blur and
colours drift. Against the drift each clip's colours may be set by the seam, or by the first clip.

    pipe = WanImageToVideoPipeline.from_pretrained("out/pipeline").to("cuda")
    frames = chain_clips(pipe, load_image("first.png"), "a boat at sea", clips=4,
                         num_inference_steps=4, guidance_scale=1.0, height=480, width=832)
    export_to_video(frames, "long.mp4", fps=16)

Works with any Diffusers pipeline whose call takes `image` and `prompt` and returns `frames`
(WanImageToVideoPipeline of Wan 2.1 and 2.2, students and teachers alike). Source: the test-time
sliding window of Magic 1-For-1, arXiv:2502.07701, whose code is not public. Needs diffusers, torch,
numpy and PIL alone.
"""

# Shapes: F frames, H, W in px. Pixels in [0, 1].

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

Colours = Literal["seam", "first", "none"]


def chain_clips(
    pipe: Any,
    image: Image.Image,
    prompt: str | Sequence[str],
    clips: int | None = None,
    *,
    colours: Colours = "seam",
    generator: torch.Generator | None = None,
    **call: Any,
) -> list[Image.Image]:
    """The frames of `clips` clips, 1 + clips (F - 1) of them.

    Args:
        image: the first frame, of the videos' size. prompt: of all clips, or one for each.
        colours: "seam": a clip's colours are shifted and stretched so that its first frame has the
            mean and deviation of the frame that it was given; "first": so that all of its frames
            have those of the first clip's; "none".
        generator: of the noise; none means PyTorch's default one.
        call: of the pipeline's call: num_inference_steps, guidance_scale, height, width, ...
    Errors: ValueError for no clips, prompts of another number, or a first frame of another size.
    """
    prompts = _prompts(prompt, clips)
    if colours not in ("seam", "first", "none"):
        raise ValueError(f"chain_clips: expected colours of seam, first or none, got {colours!r}.")
    size = (call.get("width", image.width), call.get("height", image.height))
    if image.size != size:
        raise ValueError(
            f"chain_clips: expected a first frame of {size[0]} x {size[1]} px (width x height, as "
            f"the call), got {image.width} x {image.height}. Resize and crop it: the pipeline "
            "would stretch it."
        )
    call = {"height": image.height, "width": image.width, **call}
    frames, given, first = list[np.ndarray](), _pixels(image), None
    for text in prompts:
        made = pipe(
            image=_picture(given), prompt=text, generator=generator, output_type="np", **call
        )
        clip = np.asarray(made.frames[0], dtype=np.float32)  # (F, H, W, 3)
        if clip.shape[1:] != given.shape:
            raise ValueError(
                f"chain_clips: expected frames of {given.shape[1]} x {given.shape[0]} px, got "
                f"{clip.shape[2]} x {clip.shape[1]}: the model makes videos of other sizes. Take a "
                "first frame of that size."
            )
        if first is not None and colours != "none":
            like, of = (given, clip[:1]) if colours == "seam" else (first, clip)
            clip = _with_colours(clip, of, like)
        first = clip if first is None else first
        frames += [*(clip if not frames else clip[1:])]
        given = clip[-1]
    return [_picture(frame) for frame in frames]


def _prompts(prompt: str | Sequence[str], clips: int | None) -> list[str]:
    """One for each clip."""
    texts = [prompt] * (1 if clips is None else clips) if isinstance(prompt, str) else [*prompt]
    if not texts or (clips is not None and clips != len(texts)):
        raise ValueError(
            f"chain_clips: expected one prompt or one for each of {clips} clips, at least one, got "
            f"{len(texts)}."
        )
    return texts


def _with_colours(clip: np.ndarray, of: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) shifted and stretched by channel so that its part `of` has like's mean and
    deviation."""
    channels = [x.reshape(-1, x.shape[-1]) for x in (of, like)]
    (mean, wanted), (std, spread) = ([f(x, axis=0) for x in channels] for f in (np.mean, np.std))
    scaled = (clip - mean) * (spread / np.maximum(std, 1e-6)) + wanted
    return np.clip(scaled, 0.0, 1.0).astype(np.float32)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0


def _picture(frame: np.ndarray) -> Image.Image:
    return Image.fromarray((frame * 255.0).round().astype(np.uint8))
