"""Pictures are read as a viewer shows them, from named formats alone."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.decode import MAX_PIXELS, decode_image
from stepdistill.data.paths import image_names

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes, size_px: int | None = None) -> torch.Tensor:
    """(3, H, W) in 0..255."""
    return ((decode_image(data, "x", size_px) + 1) * 127.5).round().int()


def solid(color: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (4, 4), color)


def assert_solid(data: bytes, color: tuple[int, int, int], tolerance: int = 0) -> None:
    found = pixels(data)
    assert found.shape == (3, 4, 4)
    assert int((found - torch.tensor(color).view(3, 1, 1)).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "AVIF", "JPEG"])
def test_every_named_format_is_read(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    assert_solid(saved(solid(RED), kind, **options), RED, 6 if kind in ("JPEG", "AVIF") else 0)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PCX", "TGA", "PDF"])
def test_no_other_format_is_opened(kind) -> None:
    with pytest.raises(CorruptItemError, match="x"):
        decode_image(saved(solid(RED), kind), "x", None)


def test_ghostscript_is_never_started(monkeypatch) -> None:
    """An EPS file by the name of a picture."""
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(CorruptItemError, match=r"3\.png"):
        decode_image(saved(solid(RED), "EPS"), "3.png", None)


def test_the_orientation_of_a_camera_is_applied() -> None:
    image = Image.new("RGB", (4, 2), BLUE)
    image.paste(RED, (0, 0, 2, 2))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    found = pixels(saved(image, exif=exif))
    assert found.shape == (3, 4, 2)
    assert found[:, 0, 0].tolist() == list(RED)  # left has become top
    assert found[:, 3, 0].tolist() == list(BLUE)


@pytest.mark.parametrize("level", [0, 1000, 30000, 65535])
def test_sixteen_bits_of_grey_are_scaled(level) -> None:
    image = Image.fromarray(np.full((4, 4), level, np.uint16))
    assert_solid(saved(image), (round(level / 257),) * 3)


def test_floats_are_of_zero_to_one() -> None:
    half = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert_solid(saved(half, "TIFF"), (128, 128, 128))
    for value in (-0.5, 2.0, np.nan, np.inf):
        wrong = Image.fromarray(np.full((4, 4), value, np.float32))
        with pytest.raises(CorruptItemError):
            decode_image(saved(wrong, "TIFF"), "x", None)


def test_what_is_transparent_shows_white() -> None:
    assert_solid(saved(solid((255, 0, 0, 0), "RGBA")), WHITE)
    assert_solid(saved(solid((255, 0, 0, 255), "RGBA")), RED)
    assert_solid(saved(solid((255, 0, 0, 51), "RGBA")), (255, 204, 204))
    assert_solid(saved(solid((0, 0), "LA")), WHITE)
    palette = solid(RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert_solid(saved(palette), RED)
    assert_solid(saved(palette, transparency=palette.getpixel((0, 0))), WHITE)


def test_cmyk_and_bits() -> None:
    assert_solid(saved(solid((0, 255, 255, 0), "CMYK"), "TIFF"), RED)
    assert_solid(saved(Image.new("1", (4, 4), 1)), WHITE)


def test_the_first_frame_of_an_animation_is_taken_and_said() -> None:
    data = saved(solid(RED), "GIF", save_all=True, append_images=[solid(BLUE)])
    with pytest.warns(UserWarning, match="first frame"):
        assert_solid(data, RED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_solid(saved(solid(RED), "GIF"), RED)


def test_a_picture_that_claims_too_much_is_never_unpacked(monkeypatch) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    data = saved(Image.new("1", (side, side)))
    assert len(data) < 100_000
    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(CorruptItemError):
        decode_image(data, "x", 64)


def test_hidden_files_are_no_pictures(tmp_path) -> None:
    for name in ("a.PNG", "._a.png", ".ipynb_checkpoints/a.png", "b.tiff", "c.txt", "d/e.avif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(image_names(tmp_path)) == ["a.PNG", "b.tiff", "d/e.avif"]
