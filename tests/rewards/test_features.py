"""Pixel networks whose hidden states heads read: their blocks, gradients, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import learned_network
from torch import nn
from transformers import Dinov2Config, Dinov2Model, GPT2Config

from stepdistill.evaluation.learned import LearnedFeatures
from stepdistill.losses.pixels import PixelOptions
from stepdistill.rewards import build_scorers, check_scorers
from stepdistill.rewards.features import PixelFeatures


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned_network(tmp_path_factory.mktemp("learned"))


def built(network: Path, **options: object) -> PixelFeatures:
    spec = PixelOptions(network=str(network), **options).spec  # type: ignore[arg-type]
    made = build_scorers({"pixels": spec}, {})["pixels"]
    assert isinstance(made, PixelFeatures)
    return made


@pytest.mark.filterwarnings("ignore:pixels. expected a preprocessor_config")
def test_a_transformer_s_layers_are_blocks_of_tokens(dino) -> None:
    net = built(dino)
    assert [*net.blocks] == ["mid", "block.0", "block.1", "block.2"]
    images = torch.rand(2, 3, 40, 20, requires_grad=True)
    states = net.features(images, ("all",))
    assert sorted(states) == ["block.0", "block.1", "block.2"]
    assert {tuple(value.shape) for value in states.values()} == {(2, 5, 8)}
    assert all(net.blocks[name].dim == 8 for name in states)
    (grad,) = torch.autograd.grad(states["block.2"].square().sum(), images)
    assert bool((grad.abs().amax((1, 2, 3)) > 0).all())
    with torch.no_grad():
        square = torch.rand(2, 3, 28, 28) * 2 - 1
        wanted = net.net(pixel_values=square, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(net.features(square, ("block.2",))["block.2"], wanted)
        assert net(square, square).tolist() == [0.0, 0.0]
        assert float(net(square, square.flip(3)).min()) > 0.0
    assert not any(p.requires_grad for p in net.parameters())
    assert built(dino, size_px=42).features(square, ("mid",))["mid"].shape == (2, 10, 8)


def test_a_network_of_one_s_own_images_has_maps(learned) -> None:
    """The same that `evaluate` measures in: means of its last two maps are its features."""
    net = built(learned)
    images = torch.rand(2, 3, 16, 16)
    states = net.features(images * 2 - 1, ("block.3", "block.4"))
    judge = LearnedFeatures(learned)
    wanted = judge(judge.preprocess(images))
    means = torch.cat([states[name].mean((2, 3)) for name in states], 1)
    torch.testing.assert_close(means, wanted, rtol=2e-2, atol=2e-2)  # that one rounds to 8 bits
    assert net.blocks["block.4"].dim == 16
    assert net.blocks["mid"].layout == "map"


@pytest.mark.filterwarnings("ignore:pixels. expected a preprocessor_config")
def test_shapes_alone_need_no_weights(dino, learned) -> None:
    for folder in (dino, learned):
        with torch.device("meta"):
            shapes = PixelFeatures(PixelOptions(network=str(folder)), weights=False)
        assert all(p.is_meta for p in shapes.parameters())
        assert shapes.blocks == built(folder).blocks


def test_what_is_no_network_is_one_line(tmp_path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "text")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text("raise SystemExit('ran')")
    foreign = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(foreign))
    for network, message in (
        (None, "gan.pixels.network: expected a folder or Hub id of a vision model, got none. Give"),
        (str(tmp_path), r"gan.pixels.network: expected .* \(a folder\)"),
        (str(tmp_path / "code"), r"gan.pixels.network: expected .* \(a folder\)"),
        ("no/such-model", "no such Hub id at hand"),
        (str(tmp_path / "text"), "gan.pixels.network: expected a model of images, got .* of gpt2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_scorers({"pixels": PixelOptions(network=network).spec}, {})
    with pytest.raises(TypeError, match="whose hidden states heads read"):
        check_scorers({"pixels": PixelOptions().spec}, {"pixels": nn.Identity()})
