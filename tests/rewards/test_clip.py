"""CLIP cosine on a tiny open_clip model: against its own parts, its PIL path, and its gradient."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.losses.rewards import CLIPOptions
from stepdistill.rewards.clip import CLIPScorer, quick_gelu

PROMPTS = ["a cat", "two dogs on a red sofa"]
MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_tiny(folder: Path, **preprocess: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**MODEL)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder) -> CLIPScorer:
    return CLIPScorer(CLIPOptions(model=f"local-dir:{folder}", pretrained=None)).requires_grad_(
        False
    )


def smooth(height: int, width: int) -> Tensor:
    """Two smooth images in [-1, 1]."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    one = torch.stack([torch.sin(3 * x + y), torch.cos(2 * y * x), 0.5 * x - 0.4 * y])
    return torch.stack([0.9 * one, 0.7 * one.flip(0)])


def test_equals_the_cosine_made_by_hand(scorer, folder) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = smooth(32, 32)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    with torch.no_grad():
        image = model.encode_image(((pixels + 1) / 2 - mean) / std)
        text = model.encode_text(open_clip.tokenize(PROMPTS, context_length=16))
        by_hand = (image * text).sum(1) / (image.norm(dim=1) * text.norm(dim=1))
        own = scorer(pixels, PROMPTS)
    torch.testing.assert_close(own, by_hand, rtol=1e-5, atol=1e-6)
    assert float((own[0] - own[1]).abs()) > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (20, 28), (32, 32)])
def test_preprocessing_is_the_pil_path_s(scorer, size) -> None:
    transform = open_clip.image_transform(32, is_train=False)
    images = smooth(*size)
    own = scorer.preprocess(images)
    eight_bit = ((images + 1) * 127.5).round().byte()
    pil = torch.stack([transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in eight_bit])
    assert own.shape == pil.shape
    # PIL rounds to 8 bits three times: the input, after the rows, after the columns.
    assert float((own - pil).abs().max()) < 1.5 / 255 / 0.26


def test_gradient_reaches_every_image_and_descends(scorer) -> None:
    images = smooth(64, 64).requires_grad_(True)
    before = scorer(images, PROMPTS)
    (grad,) = torch.autograd.grad(before.sum(), images)
    assert bool(grad.isfinite().all())
    sizes = grad.flatten(1).norm(dim=1)
    assert float(sizes.min()) > 1e-4
    step = 1e-2 / float(sizes.max())
    with torch.no_grad():
        after = scorer(images + step * grad, PROMPTS)
    gain = float((after - before.detach()).sum())
    assert gain == pytest.approx(step * float(grad.square().sum()), rel=0.1)
    assert all(p.grad is None for p in scorer.parameters())


def test_values_outside_the_range_keep_their_gradient(scorer) -> None:
    images = torch.full((1, 3, 32, 32), 1.5, requires_grad=True)
    (grad,) = torch.autograd.grad(scorer(images, PROMPTS[:1]).sum(), images)
    assert float(grad.abs().max()) > 0.0


def test_a_squashing_model_sees_the_whole_image(tmp_path) -> None:
    folder = save_tiny(tmp_path / "squash", resize_mode="squash", mean=[0.5] * 3, std=[0.5] * 3)
    own = CLIPScorer(CLIPOptions(model=f"local-dir:{folder}", pretrained=None))
    images = torch.zeros(1, 3, 32, 64)
    images[..., 32:] = 1.0
    seen = own.preprocess(images)
    assert seen.shape == (1, 3, 32, 32)
    assert float(seen[..., :12].abs().max()) < 0.05
    assert float((seen[..., 20:] - 1).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "ViT-B-33"}, "expected a model of open_clip"),
        ({"pretrained": "nowhere.pt"}, r"pretrained to be one of .*'openai'.* or a file"),
        ({"pretrained": None}, "pretrained to be one of"),
        ({"model": "local-dir:/nowhere", "pretrained": None}, "folder with open_clip_config"),
        ({"model": "local-dir:/nowhere"}, "expected pretrained null"),
    ],
)
def test_wrong_names_are_said_by_the_check(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        CLIPScorer.check(CLIPOptions(**options))


def test_weights_of_a_tag_run_with_the_activation_they_were_trained_with(
    folder, tmp_path, monkeypatch
) -> None:
    """The tag says QuickGELU, the named model doesn't, as for ViT-L-14 and openai."""
    (tmp_path / "tiny-plain.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(tmp_path / "tiny-plain.json")
    table = {"quick": {"quick_gelu": True}, "plain": {"quick_gelu": False}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-plain", table)
    file = str(folder / "open_clip_model.safetensors")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: file)
    images, scores = smooth(32, 32), {}
    for tag, quick in (("quick", True), ("plain", False)):
        by_hand = open_clip.create_model("tiny-plain", file, force_quick_gelu=quick)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # open_clip warns where the two differ
            scorer = CLIPScorer(CLIPOptions(model="tiny-plain", pretrained=tag))
        with torch.no_grad():
            scores[tag] = scorer.model.encode_image(scorer.preprocess(images))
            torch.testing.assert_close(scores[tag], by_hand.encode_image(scorer.preprocess(images)))
    assert float((scores["quick"] - scores["plain"]).abs().max()) > 1e-3


def test_every_tag_s_activation_is_read_from_the_table() -> None:
    for model, tag in open_clip.list_pretrained():
        told = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        assert quick_gelu(model, tag) == told, (model, tag)
    assert quick_gelu("ViT-L-14", "openai")
    assert not quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
    assert not quick_gelu("ViT-L-14", "openai.pt")
    assert not quick_gelu("local-dir:folder", None)


def test_wrong_weights_say_which_model_a_file_of_openai_s_needs() -> None:
    with pytest.raises(ValueError, match="file of OpenAI's weights, set model to ViT-L-14-quickg"):
        CLIPScorer.check(CLIPOptions(model="ViT-L-14", pretrained="nowhere.pt"))
    with pytest.raises(ValueError, match=r"got 'nowhere\.pt'\.$"):
        CLIPScorer.check(CLIPOptions(model="ViT-L-14-quickgelu", pretrained="nowhere.pt"))


def test_weights_that_cannot_be_had_say_so_too(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no network.")

    monkeypatch.setattr("open_clip.create_model", refuse)
    with pytest.raises(ValueError, match="file of OpenAI's weights, set model to ViT-L-14-quickg"):
        CLIPScorer(CLIPOptions(model="ViT-L-14", pretrained="openai"))


def test_the_defaults_pass_the_check() -> None:
    CLIPScorer.check(CLIPOptions())


def test_a_folder_without_weights_is_refused(tmp_path) -> None:
    folder = save_tiny(tmp_path / "empty")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected weights for 'local-dir"):
        CLIPScorer(CLIPOptions(model=f"local-dir:{folder}", pretrained=None))


def test_images_instead_of_prompts_are_refused(scorer) -> None:
    with pytest.raises(ValueError, match="expected prompts as text"):
        scorer(smooth(32, 32), smooth(32, 32))
