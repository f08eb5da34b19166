"""Clips chained by pixels: what each is given, where they join, their colours, and bad input."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run, run_without_package

from stepdistill.families.wan_i2v import WanImageToVideoFamily
from stepdistill.storage.bundled import bundled_file
from stepdistill.testing.tiny_video import tiny_wan_i2v

FILE = bundled_file("pipelines/sliding_window.py")
SIZE = {"height": 16, "width": 32, "num_frames": 5}


def module():
    names: dict = {}
    exec(compile(FILE.read_text(), str(FILE), "exec"), names)
    return SimpleNamespace(**names)


chain_clips = module().chain_clips


class Told:
    """A pipeline whose frames are its first frame, brighter by 20 levels each, and what it was
    told. gain: what its decoder makes of the contrast."""

    def __init__(self, gain: float = 1.0) -> None:
        self.calls, self.gain = [], gain

    def __call__(self, image, prompt, generator, output_type, **call):
        self.calls.append({"image": np.asarray(image), "prompt": prompt, **call})
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = (pixels - 0.5) * self.gain + 0.5
        frames = np.stack([pixels + i * 5 / 255 for i in range(5)])
        return SimpleNamespace(frames=np.clip(frames, 0, 1)[None])


def picture() -> Image.Image:
    level = np.linspace(60, 120, 32).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(level[None, :, None], (16, 32, 3)).copy())


def test_a_clip_begins_at_the_last_frame_which_is_shown_once() -> None:
    pipe = Told()
    frames = chain_clips(pipe, picture(), ["a", "b", "c"], colours="none", num_inference_steps=2)
    assert len(frames) == 1 + 3 * 4
    means = [np.asarray(frame).mean() for frame in frames]
    assert np.allclose(np.diff(means), 5, atol=0.6)
    assert [call["prompt"] for call in pipe.calls] == ["a", "b", "c"]
    for k, call in enumerate(pipe.calls):
        assert np.array_equal(call["image"], np.asarray(frames[4 * k]))
        assert (call["height"], call["width"], call["num_inference_steps"]) == (16, 32, 2)


@pytest.mark.parametrize("colours", ["none", "seam", "first"])
def test_colours_of_a_drifting_decoder(colours) -> None:
    pipe = Told(gain=0.8)
    frames = chain_clips(pipe, picture(), "a", 4, colours=colours)
    spread = [float(np.asarray(frame).std()) for frame in frames]
    assert spread[4] == pytest.approx(spread[0], abs=0.5)
    if colours == "none":
        assert spread[-1] < 0.6 * spread[0]
    else:
        assert spread[-1] == pytest.approx(spread[4], rel=0.1)


@pytest.mark.full
def test_with_a_real_pipeline_each_clip_has_noise_of_its_own() -> None:
    pipe = WanImageToVideoFamily(tiny_wan_i2v(boundary_ratio=0.9)).pipeline
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, **SIZE}

    def made(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return chain_clips(pipe, picture(), "a", 2, colours="none", generator=generator, **options)

    frames = made(0)
    assert len(frames) == 9
    assert frames[0].size == (32, 16)
    again, other = made(0), made(1)
    assert all(np.array_equal(a, b) for a, b in zip(frames, again, strict=True))
    assert not np.array_equal(frames[-1], other[-1])
    generator = torch.Generator().manual_seed(0)
    alone = [
        pipe(picture() if k == 0 else frames[4], "a", generator=generator, **options).frames[0]
        for k in range(2)
    ]
    assert np.allclose(np.asarray(frames[8]), alone[1][-1] * 255, atol=0.51)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "at least one, got 0"),
        ({"prompt": ["a"], "clips": 2}, "one for each of 2 clips, at least one, got 1"),
        ({"prompt": "a", "width": 64}, "a first frame of 64 x 16 px .* got 32 x 16"),
        ({"prompt": "a", "colours": "warm"}, "colours of seam, first or none, got 'warm'"),
    ],
)
def test_bad_input_is_told_before_a_call(given, message) -> None:
    pipe = Told()
    with pytest.raises(ValueError, match=message):
        chain_clips(pipe, picture(), **given)
    assert pipe.calls == []


@pytest.mark.full
def test_it_needs_no_package_of_ours(tmp_path) -> None:
    code = f"exec(open({str(FILE)!r}).read()); print(chain_clips.__name__)"
    done = run(partial(run_without_package, code), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "chain_clips\n"), done.stderr
