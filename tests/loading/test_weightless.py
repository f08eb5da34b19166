"""Encoders without their denoiser: the same encodings, and none of its files is there to open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.runs import fingerprint, teacher_dir

from stepdistill.cache.encoded import encoder_facts
from stepdistill.families.registry import FAMILIES, load_encoders, load_family

CPU = torch.device("cpu")


def stripped(source: Path, folder: Path, net: str) -> Path:
    """A pipeline folder without the weights of that part."""
    shutil.copytree(source, folder)
    weights = list((folder / net).glob("*.safetensors"))
    assert weights
    for path in weights:
        path.unlink()
    return folder


# Their pipelines ask the denoiser for different things: Lumina2's device is its denoiser's, and
# Wan's calls it optional.
@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_encodings_without_the_denoiser_s_weights(name, tmp_path, tmp_path_factory) -> None:
    source = teacher_dir(name, tmp_path_factory)
    whole = load_family(source)
    family = load_encoders(stripped(source, tmp_path / "model", whole.net_name), CPU)
    assert family.sample_shape() == whole.sample_shape()
    sound = whole.output == "audios"
    size = (whole.channels, whole.num_samples) if sound else (3, 32, 32)
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    facts, told = [], ["a red cube", ""] if whole.conditioning == "prompt" else [0, 1]
    for each in (whole, family):
        with torch.no_grad():
            tensors = {"latents": each.latents(image), **each.encode(told).tensors}
        facts.append(
            (fingerprint(tensors), *(encoder_facts(each, None, kind) for kind in (True, False)))
        )
    assert facts[0] == facts[1]


def test_all_weights_are_one_zero(tmp_path_factory) -> None:
    net = load_encoders(teacher_dir("sd_v", tmp_path_factory), CPU).net
    assert len({p.data_ptr() for p in net.parameters()}) == 1
    plain = load_family(teacher_dir("sd_v", tmp_path_factory)).net
    assert {n: p.shape for n, p in net.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


def test_a_broken_configuration_is_said(tmp_path, tmp_path_factory) -> None:
    folder = stripped(teacher_dir("sd_v", tmp_path_factory), tmp_path / "model", "unet")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"readable unet/config\.json"):
        load_encoders(folder, CPU)
