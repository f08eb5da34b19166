"""Low-resolution images: what is left of a picture, the same wherever a run is resumed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from pydantic import ValidationError
from support.samples import SHAPES, sized_folder
from torch import Tensor

from stepdistill.config.run import DataConfig
from stepdistill.core.types import CONDITIONING, EASIER
from stepdistill.data import degrade
from stepdistill.data.degradation import Degradation
from stepdistill.data.degrade import degraded
from stepdistill.data.fingerprint import data_facts
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.source import fitted
from stepdistill.data.stream import provided_fields, stream

BICUBIC, REAL = (Degradation(factor=8, kind=kind) for kind in ("bicubic", "real_esrgan"))


def texture(side: int = 64) -> Tensor:
    """(3, side, side) in [-1, 1]: detail of all sizes."""
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def fine_energy(image: Tensor, above: float) -> float:
    """Energy at frequencies above that share of the highest."""
    spectrum = torch.fft.rfft2(image).abs() ** 2
    rows, columns = image.shape[-2:]
    high = torch.maximum(torch.fft.fftfreq(rows).abs()[:, None], torch.fft.rfftfreq(columns)[None])
    return float(spectrum[..., high > 0.5 * above].sum() / spectrum.sum())


# --------------------------------------------------------------------------------- the pictures
def test_the_easier_image_has_more_detail() -> None:
    image, levels = texture(), []
    for factor in (8, 4, 2):
        made = degraded(image, factor, BICUBIC, seed=3)
        assert made.shape == image.shape
        assert float(made.abs().max()) <= 1.0
        levels.append(fine_energy(made, 1 / 8))
    assert levels[0] < levels[1] < levels[2]


def test_bicubic_keeps_what_its_factor_can_hold() -> None:
    """A slow wave passes, a fast one is averaged away and not folded into a slow one."""
    at = torch.arange(64) / 64
    slow, fast = (torch.sin(2 * torch.pi * n * at).expand(3, 64, 64) for n in (2, 30))
    kept = degraded(slow, 4, BICUBIC, 0)[..., 8:-8, 8:-8]
    assert float((kept - slow[..., 8:-8, 8:-8]).abs().max()) < 0.06
    assert float(degraded(fast, 4, BICUBIC, 0)[..., 8:-8, 8:-8].abs().max()) < 0.03


def test_an_image_of_one_colour_stays_it_but_for_eight_bits() -> None:
    image = torch.full((3, 32, 32), 0.301)
    assert float((degraded(image, 8, BICUBIC, 0) - image).abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize("rule", [BICUBIC, REAL], ids=lambda rule: rule.kind)
def test_it_is_made_in_the_size_that_the_model_reads(rule) -> None:
    assert degraded(texture(), 8, rule, 0, px_beside=4).shape == (3, 16, 16)
    assert degraded(texture(8), 16, rule, 0).shape == (3, 8, 8)  # one pixel of it is left


def test_real_degradations_are_drawn_by_their_seed_alone() -> None:
    image = texture()
    first = degraded(image, 8, REAL, seed=1)
    torch.rand(5)
    assert torch.equal(first, degraded(image, 8, REAL, seed=1))
    others = [degraded(image, 8, REAL, seed) for seed in range(2, 12)]
    assert all(float((one - first).abs().mean()) > 1e-3 for one in others)
    assert torch.equal(degraded(image, 8, BICUBIC, 1), degraded(image, 8, BICUBIC, 2))


def test_both_factors_of_a_sample_have_the_same_draws(monkeypatch) -> None:
    """Kernels, noise and compression are those of the sample; another sample has its own."""
    seen: list[object] = []
    plain = {name: getattr(degrade, name) for name in ("_filtered", "_noisy", "_jpeg")}

    def noting(name):
        def call(x, *told):
            seen.append(
                (name, *(repr(one) for one in told if not isinstance(one, torch.Generator)))
            )
            return plain[name](x, *told)

        return call

    for name in plain:
        monkeypatch.setattr(degrade, name, noting(name))
    made = []
    for factor, seed in ((8, 5), (4, 5), (4, 6)):
        seen.clear()
        degraded(texture(), factor, REAL, seed)
        made.append(list(seen))
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert len(made[0]) >= 5


def test_real_degradations_are_further_from_the_picture_the_harder() -> None:
    image = degraded(texture(), 2, BICUBIC, 0)
    errors = [
        sum(float((degraded(image, f, REAL, s) - image).square().mean()) for s in range(8))
        for f in (8, 4, 2)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_real_degradations_keep_the_picture_on_average() -> None:
    """They scatter about it: colours and rough shapes are those of the image."""
    at = torch.linspace(-0.8, 0.8, 64)
    image = torch.stack([at.expand(64, 64), at.expand(64, 64).T, torch.zeros(64, 64)])
    made = torch.stack([degraded(image, 4, REAL, seed) for seed in range(24)])
    assert float((made.mean(0) - image)[:, 8:-8, 8:-8].abs().mean()) < 0.06
    assert float(made.std(0).mean()) > 0.02


# ----------------------------------------------------------------------------------- the stream
def folder_of(tmp_path, rule: Degradation = REAL, **sizing):
    folder = tmp_path / f"pictures{len(list(tmp_path.iterdir()))}"
    data = ImageFolderDataset(sized_folder(folder, [SHAPES[0]] * 5, ()), 32)
    data.degradation = rule
    return fitted(data, (32, 32), 8, **{"easier": True, **sizing})


def test_a_stream_gives_both_images_anew_in_each_epoch_and_alike_when_resumed(tmp_path) -> None:
    data = folder_of(tmp_path)
    steps = list(islice(stream(data, 5, seed=7), 2))  # an epoch each
    for raw in steps:
        assert raw[CONDITIONING].shape == raw[EASIER].shape == (5, 3, 32, 32)
    resumed = next(stream(data, 5, seed=7, start=1))
    for key in (CONDITIONING, EASIER):
        assert torch.equal(resumed[key], steps[1][key])
    rows = [dict(zip(raw["index"], raw[CONDITIONING], strict=True)) for raw in steps]
    assert all(not torch.equal(rows[0][i], rows[1][i]) for i in range(5))
    parts = [next(stream(data, 2, 7, rank, 2, start=0)) for rank in (0, 1)]
    joined = torch.cat([part[CONDITIONING] for part in parts])
    assert torch.equal(joined, next(stream(data, 4, 7))[CONDITIONING])


def test_only_what_is_wanted_is_made(tmp_path) -> None:
    assert EASIER not in next(stream(folder_of(tmp_path, easier=False), 2, 0))
    raw = next(stream(folder_of(tmp_path, px_beside=4), 2, 0))
    assert raw[CONDITIONING].shape == (2, 3, 8, 8)
    assert raw["image"].shape == (2, 3, 32, 32)


def test_fields_and_facts_of_data_tell_of_it(tmp_path) -> None:
    data = folder_of(tmp_path)
    assert {"x0", CONDITIONING, EASIER} <= provided_fields(data)
    assert data_facts(data)["degradation"]["factor"] == 8
    twice = folder_of(tmp_path, Degradation(factor=2))
    assert EASIER not in provided_fields(twice)  # its easier image would be the image


def test_one_prompt_stands_for_captions(tmp_path) -> None:
    data = folder_of(tmp_path, Degradation(factor=4, prompt=""))
    assert next(stream(data, 2, 0))["prompt"] == ["", ""]


# ----------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 6}, r"degradation\.factor: expected a power of two above 1, got 6"),
        ({"factor": 1}, "expected a power of two"),
        ({"factor": -8}, "expected a power of two"),
        ({"factor": 8, "easier_factor": 3}, "easier_factor: expected a power of two"),
        ({"factor": 4, "easier_factor": 4}, "expected less than factor 4, got 4"),
        ({"easier_factor": 4}, "expected factor beside"),
        ({"kind": "real_esrgan"}, "expected factor beside"),
        ({"prompt": ""}, "expected factor beside"),
    ],
)
def test_factors_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(ValidationError, match=message):
        Degradation(**options)


def test_a_factor_that_leaves_nothing_of_an_image_is_refused(tmp_path) -> None:
    for factor in (64, 128):
        with pytest.raises(ValueError, match=f"divisor of the images' 32 x 32 px, got {factor}"):
            folder_of(tmp_path, Degradation(factor=factor))


@pytest.mark.parametrize("source", ["prompts_file", "pairs_dir"])
def test_there_have_to_be_images(source, tmp_path) -> None:
    (tmp_path / "x").write_text("a")
    with pytest.raises(ValidationError, match=f"expected images .* got {source}"):
        DataConfig(**{source: str(tmp_path / "x"), "degradation": {"factor": 4}})


def test_the_easier_factor_is_half() -> None:
    assert [Degradation(factor=f).easier for f in (2, 4, 16)] == [None, 2, 8]
    assert Degradation(factor=16, easier_factor=2).easier == 2
