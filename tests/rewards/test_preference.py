"""HPSv2 and aesthetic heads on a tiny CLIP: the right arithmetic, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from rewards.test_clip import MODEL, PROMPTS, save_tiny, smooth
from safetensors.torch import save_file

from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.clip import CLIPScorer
from stepdistill.rewards.preference import (
    AestheticOptions,
    AestheticScorer,
    HPSOptions,
    HPSScorer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> tuple[Path, torch.nn.Linear]:
    layer = torch.nn.Linear(8, 1)
    file = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(layer.state_dict(), file)
    return file, layer


def test_hps_is_the_cosine_in_its_own_weights(folder, tmp_path) -> None:
    config = tmp_path / "tiny-hps.json"
    config.write_text(json.dumps(MODEL))
    open_clip.add_model_config(config)
    weights = str(folder / "open_clip_model.safetensors")
    options = HPSOptions(model="tiny-hps", pretrained=weights)
    HPSScorer.check(options)
    plain = CLIPScorer(CLIPOptions(model=f"local-dir:{folder}", pretrained=None))
    images = smooth(32, 32)
    with torch.no_grad():
        torch.testing.assert_close(HPSScorer(options)(images, PROMPTS), plain(images, PROMPTS))


def test_hps_without_its_file_is_refused() -> None:
    with pytest.raises(ValueError, match="expected pretrained to be a local file of HPSv2"):
        HPSScorer.check(HPSOptions())


def test_aesthetic_is_the_head_on_the_normalised_embedding(folder, head) -> None:
    file, layer = head
    options = AestheticOptions(model=f"local-dir:{folder}", pretrained=None, head=str(file))
    scorer, images = AestheticScorer(options), smooth(32, 32)
    with torch.no_grad():
        embedded = scorer.model.encode_image(scorer.preprocess(images), normalize=True)
        torch.testing.assert_close(scorer(images, PROMPTS), layer(embedded)[:, 0])


def test_the_activations_are_those_that_the_weights_were_trained_with(head) -> None:
    """From a local file too, where no table says it: OpenAI's QuickGELU, LAION-2B's plain GELU."""
    options = AestheticOptions(head=str(head[0]))
    AestheticScorer.check(options)
    assert open_clip.get_model_config(options.model)["quick_gelu"] is True
    assert "quick_gelu" not in open_clip.get_model_config(HPSOptions().model)


def test_a_pickled_head_or_one_of_another_width_is_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected head to be a \.safetensors file"):
        AestheticScorer.check(AestheticOptions(head=str(tmp_path / "head.pth")))
    save_file(torch.nn.Linear(5, 1).state_dict(), tmp_path / "head.safetensors")
    options = AestheticOptions(
        model=f"local-dir:{folder}", pretrained=None, head=str(tmp_path / "head.safetensors")
    )
    with pytest.raises(ValueError, match="expected a head for width 8, got 5"):
        AestheticScorer(options)(smooth(32, 32), PROMPTS)
