"""HPSv2 and aesthetic heads on a tiny CLIP: the right arithmetic, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from rewards.test_clip import MODEL, PROMPTS, save_tiny, smooth
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.clip import CLIPScorer
from stepdistill.rewards.preference import (
    AestheticOptions,
    AestheticScorer,
    HPSOptions,
    HPSScorer,
    PickOptions,
    PickScorer,
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


# ------------------------------------------------------------------------------------ PickScore
def save_pick(folder: Path) -> Path:
    """A tiny CLIPModel as PickScore's folder has it: without a tokenizer."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**tower, "num_attention_heads": 2, "max_position_embeddings": 77},
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory) -> Path:
    return save_pick(tmp_path_factory.mktemp("pick") / "model")


def test_pickscore_is_the_cosine_that_transformers_itself_makes(pick_folder) -> None:
    options = PickOptions(model=str(pick_folder))
    PickScorer.check(options)
    scorer, images = PickScorer(options), smooth(48, 32)
    stock = CLIPModel.from_pretrained(pick_folder).eval()
    with torch.no_grad():
        made = stock(
            input_ids=scorer.tokenizer(list(PROMPTS)), pixel_values=scorer.preprocess(images)
        )
        expected = (made.image_embeds * made.text_embeds).sum(1)
        torch.testing.assert_close(scorer(images, PROMPTS), expected)
    images.requires_grad_()
    scorer(images, PROMPTS).sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_pickscore_reads_no_padding(pick_folder) -> None:
    """open_clip pads by 0, transformers by the end token."""
    scorer = PickScorer(PickOptions(model=str(pick_folder)))
    tokens = scorer.tokenizer(list(PROMPTS))
    end = tokens.argmax(1, keepdim=True)
    padded = torch.where(torch.arange(77)[None] > end, tokens.max(), tokens)
    assert not torch.equal(padded, tokens)
    with torch.no_grad():
        texts = [scorer.model.encode_text(some, normalize=True) for some in (tokens, padded)]
    torch.testing.assert_close(*texts)


def test_pickscore_without_its_folder_is_refused(pick_folder, tmp_path) -> None:
    for model in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(ValueError, match="expected model to be the folder of a CLIPModel"):
            PickScorer.check(PickOptions(model=model))
    PickScorer.check(PickOptions())  # of the Hub: fetched where it is built
    with pytest.raises(ValueError, match="expected the weights of 'nobody/nothing'"):
        PickScorer(PickOptions(model="nobody/nothing"))
