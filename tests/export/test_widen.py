"""A text-to-image UNet that reads an image too, and at first does not heed it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from support.runs import teacher_dir

from stepdistill.export.widen import widen_pipeline


def test_the_new_channels_have_no_effect_at_first(tmp_path, tmp_path_factory) -> None:
    folder = widen_pipeline(teacher_dir("sd", tmp_path_factory), tmp_path / "wide")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "StableDiffusionInstructPix2PixPipeline"
    plain = diffusers.DiffusionPipeline.from_pretrained(teacher_dir("sd", tmp_path_factory))
    assert (pipe.unet.config.in_channels, pipe.unet.config.out_channels) == (8, 4)
    x, image = torch.randn(2, 2, 4, 8, 8)
    text = torch.randn(2, 4, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = plain.unet(x, 500, text).sample
        made = pipe.unet(torch.cat([x, image], 1), 500, text).sample
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    assert pipe.unet.conv_in.weight[:, 4:].abs().max() == 0


def test_models_of_another_class_are_refused(tmp_path, tmp_path_factory) -> None:
    with pytest.raises(
        ValueError, match=r"expected a StableDiffusionPipeline, .* got a StableDiff"
    ):
        widen_pipeline(teacher_dir("sdxl", tmp_path_factory), tmp_path / "wide")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ValueError, match="output_dir: expected a new folder"):
        widen_pipeline(teacher_dir("sd", tmp_path_factory), tmp_path / "mine")
