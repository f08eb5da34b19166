"""Feature networks through their libraries: right preprocessing, a hash, and safe files alone."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rewards.test_clip import save_tiny
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from stepdistill.demo.classifier import register_digits
from stepdistill.evaluation.features import (
    FEATURES,
    CLIPFeatures,
    InceptionFeatures,
    Kind,
    VisionFeatures,
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
    net = VisionFeatures(str(tmp_path))
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
    register_digits()
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
    assert net.facts["weights"] == network_sha256(random)


class Mean:
    """A network of a user's own module."""

    name = "mean"
    facts: dict[str, str] = {"weights": "none", "preprocess": "as made"}  # noqa: RUF012

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).mean(2)


def test_a_module_s_own_network_is_named_by_its_address() -> None:
    net = feature_net(f"{__name__}:Mean", "cpu")
    assert (net.name, net(net.preprocess(pixels())).shape) == ("mean", (2, 3))
    with pytest.raises(ValueError, match=f"features: expected Mode in module {__name__}"):
        feature_net(f"{__name__}:Mode")


OWN = """
class Mean:
    name, facts = "mean", {"weights": "none", "preprocess": "as made"}

    def __init__(self, device):
        self.device = device

    def preprocess(self, images):
        return images

    def __call__(self, images):
        return images.flatten(2).mean(2)


class Bare(Mean):
    def __init__(self):
        pass


median = 0.5
strings = str
"""


def test_a_network_of_a_user_s_file_is_named_by_its_path(tmp_path) -> None:
    file = tmp_path / "my nets.py"
    file.write_text(OWN)
    net = feature_net(f"{file}:Mean")
    assert (net.name, net(net.preprocess(pixels())).shape) == ("mean", (2, 3))
    before = net.facts
    file.write_text(OWN + "\n")  # whose features may be others
    after = feature_net(f"{file}:Mean").facts
    assert before.keys() == after.keys() == {"weights", "preprocess", "code"}
    assert before != after


@pytest.mark.parametrize(
    ("called", "message"),
    [
        ("Mode", r"features: expected Mode in .*nets\.py, .* got None\. Mend it"),
        ("median", r"features: expected median in .*, got 0\.5\."),
        ("Bare", r"features: expected Bare in .*, got Bare: TypeError: .* positional argument"),
        ("strings", r"features: expected strings in .*, got strings, which makes 'cpu'\."),
    ],
)
def test_what_is_no_network_in_a_user_s_file_is_refused_in_one_line(
    called: str, message: str, tmp_path
) -> None:
    (tmp_path / "nets.py").write_text(OWN)
    with pytest.raises(ValueError, match=message) as refused:
        feature_net(f"{tmp_path}/nets.py:{called}")
    assert "\n" not in str(refused.value)


def test_a_user_s_file_that_is_not_there_or_fails_is_refused(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"features: expected FILE\.py:\w+ of a file that is there"
    ):
        feature_net(f"{tmp_path}/nowhere.py:Mean")
    (tmp_path / "broken.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"features: .* to run, got ZeroDivisionError: .* Mend"
        ):
            feature_net(f"{tmp_path}/broken.py:Mean")


def test_a_registered_name_is_found(monkeypatch) -> None:
    monkeypatch.setitem(FEATURES, "mine", Kind("mine:FILE", lambda file, device: Mean(file)))
    assert feature_net("mine:a.bin").device == "a.bin"  # type: ignore[attr-defined]


def save_vision_model(folder, model) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.init_weights()
    model.save_pretrained(folder)
    steps = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))


def test_a_folder_s_vision_model_gives_its_pooled_output(tmp_path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config).eval()
    save_vision_model(tmp_path / "a <net>", model)
    net = feature_net(str(tmp_path / "a <net>"))
    made = net.preprocess(pixels())
    with torch.no_grad():
        expected = model(made).pooler_output[:, :, 0, 0]
    assert (net.name, expected.shape) == ("a <net>", (2, 8))
    torch.testing.assert_close(net(made), expected)


def test_of_a_model_of_images_and_text_the_first_half_counts(tmp_path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": 9, "eos_token_id": 8}
    vision = {**small, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    save_vision_model(tmp_path / "clip", model)
    net = feature_net(str(tmp_path / "clip"))
    made = net.preprocess(pixels())
    with torch.no_grad():
        expected = model.vision_model(made).pooler_output
    torch.testing.assert_close(net(made), expected)


def test_a_folder_of_config_and_safetensors_alone_is_read_at_its_own_size(tmp_path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    save_vision_model(tmp_path, model)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"expected a preprocessor_config\.json .* 28 x 28 px"):
        net = feature_net(str(tmp_path))
    made = net.preprocess(pixels(2, 28))
    torch.testing.assert_close(made, pixels(2, 28) * 2 - 1)
    with torch.no_grad():
        torch.testing.assert_close(net(made), model(made).pooler_output)
