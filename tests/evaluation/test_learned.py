"""Feature networks made of one's own images: the loss, keeping by hash, and what distances see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stepdistill.cli import main
from stepdistill.demo.data import Split, load_digit_splits, write_image_folder
from stepdistill.evaluation import learned
from stepdistill.evaluation.features import feature_net
from stepdistill.evaluation.frechet import frechet_distance
from stepdistill.evaluation.learned import FeatureSettings, nt_xent, train_features, view

FEW = FeatureSettings(width=4, max_train_steps=4, train_batch_size=8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder of 24 handwritten digits."""
    split, folder = load_digit_splits().train, tmp_path_factory.mktemp("data") / "digits"
    write_image_folder(Split(split.images[:24], split.labels[:24]), folder)
    return folder


def test_loss_is_the_cross_entropy_of_the_other_view() -> None:
    rows = 3 * torch.eye(2)  # lengths do not count
    expected = -math.log(math.e**2 / (math.e**2 + 2))
    assert float(nt_xent(rows, rows, temperature=0.5)) == pytest.approx(expected, rel=1e-5)
    assert float(nt_xent(rows, rows.flip(0), temperature=0.5)) > expected + 1


def test_a_view_is_a_crop_of_each_image_brighter_or_of_more_contrast() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(4, 3, 8, 8)
    made = view(x, torch.Generator().manual_seed(1))
    side = made.shape[-1]
    assert 5 <= side <= 8
    # Neighbours in a row differ by 1, in a column by 8, times the contrast.
    across, down = made.diff(dim=3), made.diff(dim=2)
    torch.testing.assert_close(down[..., :-1], 8 * across[..., :-1, :], rtol=1e-4, atol=1e-3)
    contrast = across[:, 0, 0, 0]
    assert float(contrast.min()) >= 0.8
    assert float(contrast.max()) <= 1.2
    assert len(set(contrast.tolist())) == 4


def test_an_equal_call_finds_it_and_another_one_makes_another(digits, tmp_path) -> None:
    first = train_features(digits, tmp_path, FEW)
    assert first.name.startswith("digits-")
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert train_features(digits, tmp_path, FEW) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    other = train_features(digits, tmp_path, FeatureSettings(4, 4, 8, 2, seed=1))
    assert other != first
    again = train_features(digits, tmp_path / "again", FEW)
    assert again.name == first.name
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_one_that_was_cut_off_goes_on_as_if_it_had_not_been(digits, tmp_path, monkeypatch) -> None:
    steps: list[int] = []

    def cut(step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_features(digits, tmp_path / "cut", FEW, cut)
    made = train_features(digits, tmp_path / "cut", FEW, cut)
    assert steps == [1, 2, 3, 3, 4]  # what the third step did was not saved
    whole = train_features(digits, tmp_path / "whole", FEW)
    assert (made / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir() if path.is_dir()] == [made.name]


def test_the_command_names_what_evaluate_reads(digits, tmp_path, capsys) -> None:
    given = ["--max_train_steps", "2", "--width", "2", "--output_dir", str(tmp_path)]
    main(["features", "train", "--train_data_dir", str(digits), *given])
    flag, _, folder = capsys.readouterr().out.strip().partition(" ")
    net = feature_net(folder)
    assert (flag, net.name) == ("--features", Path(folder).name)
    pixels = net.preprocess(torch.rand(2, 1, 8, 20))
    assert pixels.shape == (2, 3, 8, 8)  # of the middle square
    assert net(pixels).shape == (2, 12)
    assert net.facts["made_of"].startswith("24 images, sha256 ")


def test_images_of_any_size_are_seen_by_their_middle_square(tmp_path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (16, 12, 30, 3), dtype=np.uint8)
    for index, row in enumerate(rows):
        Image.fromarray(row[:, : 12 + index]).save(tmp_path / f"{index:02d}.png")
    net = feature_net(str(train_features(tmp_path, tmp_path.parent / "made", FEW)))
    assert net.preprocess(torch.rand(1, 3, 64, 40)).shape == (1, 3, 12, 12)


def test_too_few_images_and_foreign_weights_are_refused(digits, tmp_path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    Image.new("RGB", (8, 8)).save(some / "a.png")
    with pytest.raises(ValueError, match="train_data_dir: expected 16 images or more, got 1"):
        train_features(some, tmp_path)
    made = train_features(digits, tmp_path, FEW)
    config = made / "config.json"
    config.write_text(config.read_text().replace('"width": 4', '"width": 6'))
    with pytest.raises(ValueError, match=r"expected the weights that its config\.json describes"):
        feature_net(str(made))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """(N, 1, H, W) under a Gaussian of that many px."""
    line = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * sigma**2))
    line = line / line.sum()
    wide = F.pad(images, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(wide, line.view(1, 1, 1, 7)), line.view(1, 1, 7, 1))


@pytest.mark.full
def test_distances_grow_with_blur_noise_and_lost_modes(tmp_path) -> None:
    """Of held-out real digits to the real ones, in a network made of the latter."""
    splits = load_digit_splits()
    write_image_folder(splits.train, tmp_path / "digits")
    settings = FeatureSettings(max_train_steps=STEPS, train_batch_size=64)
    net = feature_net(str(train_features(tmp_path / "digits", tmp_path / "made", settings)))

    def features(images: Tensor) -> Tensor:
        return net(net.preprocess((images / 2 + 0.5).clamp(0, 1)))

    real, others, labels = features(splits.train.images), splits.heldout, splits.heldout.labels
    noise = torch.randn(others.images.shape, generator=torch.Generator().manual_seed(0))

    def far(images: Tensor) -> float:
        return frechet_distance(real, features(images))

    floor = far(others.images)
    for worse in (
        [far(blurred(others.images, sigma)) for sigma in (0.4, 0.6, 0.8, 1.2)],
        [far(others.images + strength * noise) for strength in (0.1, 0.2, 0.4, 0.8)],
        [far(others.images[labels < most]) for most in (8, 6, 4, 2)],
    ):
        assert floor < worse[0]
        assert worse == sorted(worse)
        assert worse[-1] > 4 * floor


STEPS = 60
