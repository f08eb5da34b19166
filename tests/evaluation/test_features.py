"""Feature networks through their libraries: right preprocessing, a hash, and safe files alone."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rewards.test_clip import save_tiny
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from stepdistill.evaluation.features import (
    CLIPFeatures,
    DINOFeatures,
    InceptionFeatures,
    clean_resize,
    feature_net,
    network_sha256,
)


def pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator) / 255


def test_hash_follows_names_and_values() -> None:
    net = torch.nn.Linear(2, 2)
    before = network_sha256(net)
    net.weight.data[0, 0] += 1
    assert network_sha256(net) != before


def test_clean_resize_is_pillow_s_on_floats() -> None:
    made = clean_resize(pixels(1, 8), 5)
    channel = Image.fromarray((pixels(1, 8)[0, 1] * 255).numpy(), mode="F")
    expected = np.asarray(channel.resize((5, 5), Image.Resampling.BICUBIC)).clip(0, 255) / 255
    assert np.abs(made[0, 1].numpy() - expected).max() < 1e-6


def test_clip_features_are_the_image_embedding(tmp_path) -> None:
    folder = save_tiny(tmp_path / "clip")
    net = CLIPFeatures(f"local-dir:{folder}")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = pixels()
    arrays = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in images]
    with torch.no_grad():
        by_hand = model.encode_image(torch.stack([preprocess(Image.fromarray(a)) for a in arrays]))
    torch.testing.assert_close(net(net.preprocess(images)), by_hand, rtol=1e-4, atol=1e-5)


def test_dino_features_are_the_class_token(tmp_path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    steps = {"image_processor_type": "BitImageProcessor", "size": {"height": 28, "width": 28}}
    steps |= {"do_center_crop": False, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    net = DINOFeatures(str(tmp_path))
    made = net.preprocess(pixels())
    with torch.no_grad():
        expected = model(pixel_values=made).pooler_output
    assert made.shape == (2, 3, 28, 28)
    torch.testing.assert_close(net(made), expected)


def test_pickled_inception_of_unknown_origin_is_refused(tmp_path) -> None:
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"expected \.safetensors or the published file"):
        InceptionFeatures(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("text", ["inception", "resnet:x", ""])
def test_an_unknown_network_is_refused(text) -> None:
    with pytest.raises(ValueError, match="features: expected digits, inception:FILE"):
        feature_net(text)


@pytest.mark.full
def test_inception_reads_tensors_and_gives_its_pool_features(tmp_path, monkeypatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:  # random weights: the file is not on this machine
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "none.pth")
        random = FeatureExtractorInceptionV3("i", ["2048"], str(tmp_path / "none.pth"))
    save_file(random.state_dict(), tmp_path / "i.safetensors")
    net = InceptionFeatures(str(tmp_path / "i.safetensors"))
    made = net(net.preprocess(pixels(1, 299)))
    with torch.no_grad():
        expected = random((pixels(1, 299) * 255).round().byte())[0]
    assert made.shape == (1, 2048)
    torch.testing.assert_close(made, expected.float())
    assert net.told["weights"] == network_sha256(random)
