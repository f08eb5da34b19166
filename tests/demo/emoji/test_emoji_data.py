"""The data set is made from packages as npm writes them; captions have several widths."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from stepdistill.demo.emoji import data as emoji_data
from stepdistill.demo.emoji.captions import (
    TELL_STYLE,
    TELL_TONE,
    WIDTHS,
    Entry,
    caption,
    random_caption,
)
from stepdistill.demo.emoji.data import VARIANTS, build_data, load_data
from stepdistill.demo.emoji.teacher import write_pictures

NAMES = [
    ("1F355", "SLICE OF PIZZA", "Food & Drink", "food-prepared", False),
    ("1F34E", "RED APPLE", "Food & Drink", "food-fruit", False),
    ("1F469-200D-1F692", "WOMAN FIREFIGHTER", "People & Body", "person-role", True),
    ("1F1FB-1F1E6", "Vatican City Flag", "Flags", "country-flag", False),
]


def drawing(size: int, kind: str) -> bytes:
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((size // 4, size // 8, size // 2, size // 2), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, kind, lossless=True)
    return buffer.getvalue()


def package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """The three packages, with four emoji; one of them in two tones, in Noto alone."""
    folder, facts = tmp_path_factory.mktemp("packages"), []
    for code, name, group, subgroup, tones in NAMES:
        one = {"unified": code, "name": name, "category": group, "subcategory": subgroup}
        if tones:
            first, rest = code.split("-", 1)
            one["skin_variations"] = {
                tone: {"unified": f"{first}-{tone}-{rest}"} for tone in ("1F3FB", "1F3FF")
            } | {"1F3FB-1F3FC": {"unified": f"{first}-1F3FB-1F3FC-{rest}"}}
        facts.append(one)
    licence = {"LICENSE": b"The licence.", "README.md": b"Read me."}
    package(
        folder / "emoji-datasource-16.0.0.tgz",
        {"emoji.json": json.dumps(facts).encode(), **licence},
    )
    fluent = {f"assets/{code.lower()}.webp": drawing(256, "WEBP") for code, *_ in NAMES}
    package(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {**fluent, "README.md": b"MIT"})
    noto = [one["unified"] for one in facts]
    noto += [v["unified"] for one in facts for v in one.get("skin_variations", {}).values()]
    drawn = {f"img/google/64/{code.lower()}.png": drawing(64, "PNG") for code in noto}
    package(folder / "emoji-datasource-google-16.0.0.tgz", {**drawn, **licence})
    return folder


@pytest.fixture
def emoji(packages, tmp_path, monkeypatch):
    held_out = tmp_path / "held_out.json"
    held_out.write_text('{"combinations": ["1f469-200d-1f692 dark noto"]}')
    monkeypatch.setattr(emoji_data, "HELD_OUT_FILE", held_out)
    build_data(packages, tmp_path / "data")
    return load_data(tmp_path / "data")


def test_each_drawing_has_its_facts_and_flags_and_pairs_of_tones_are_left_out(emoji) -> None:
    assert [entry.key for entry in emoji.entries] == [
        "1f34e no tone fluent",
        "1f34e no tone noto",
        "1f355 no tone fluent",
        "1f355 no tone noto",
        "1f469-200d-1f692 dark noto",
        "1f469-200d-1f692 light noto",
        "1f469-200d-1f692 no tone fluent",
        "1f469-200d-1f692 no tone noto",
    ]
    assert emoji.entries[0] == Entry(
        "1f34e", "red apple", "food and drink", "fruit", None, "fluent"
    )


def test_the_drawing_fills_the_picture_in_its_middle_on_white(emoji) -> None:
    assert emoji.pictures.shape == (VARIANTS, 8, 64, 64, 3)
    for picture in emoji.pictures[0]:
        rows, columns = (np.flatnonzero((picture < 128).any((2, axis))) for axis in (1, 0))
        assert (rows[0], rows[-1]) == (2, 61)
        assert abs(columns[0] - (63 - columns[-1])) <= 1
        assert picture[0, 0].tolist() == [255, 255, 255]
    assert all((emoji.pictures[v] != emoji.pictures[0]).any() for v in range(1, VARIANTS))
    images = emoji.images(torch.tensor([0, 1]), torch.tensor([3, 4]))
    assert images.shape == (2, 3, 64, 64)
    assert images.max() == 1


def test_the_same_packages_give_the_same_pictures(emoji, packages, tmp_path) -> None:
    build_data(packages, tmp_path / "again")
    assert np.array_equal(load_data(tmp_path / "again").pictures, emoji.pictures)


def test_licence_texts_stand_beside_the_data(emoji, tmp_path) -> None:
    found = {path.name for path in (tmp_path / "data" / "licences").iterdir()}
    assert found == {
        "fluent-README.md",
        *(
            f"{package}-{name}"
            for package in ("noto", "names")
            for name in ("LICENSE", "README.md")
        ),
    }


def test_held_out_combinations_are_never_drawn_and_many_tones_count_less(emoji) -> None:
    weights = dict(zip((e.key for e in emoji.entries), emoji.weights().tolist(), strict=True))
    assert weights["1f469-200d-1f692 dark noto"] == 0
    assert weights["1f469-200d-1f692 light noto"] == pytest.approx(4**-0.5)
    assert emoji.weights(of_all=True)[4] == pytest.approx(4**-0.5)
    assert weights["1f34e no tone noto"] == pytest.approx(2**-0.5)


def test_shipped_pictures_are_a_folder_that_training_reads(emoji, tmp_path) -> None:
    write_pictures(emoji, tmp_path / "pictures.zip")
    with zipfile.ZipFile(tmp_path / "pictures.zip") as archive:
        archive.extractall(tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()
    texts = {json.loads(line)["file_name"]: json.loads(line)["text"] for line in lines}
    assert len(texts) == 7
    assert texts["00000.webp"] == "red apple in fluent style"
    assert "dark" not in " ".join(texts.values())
    with Image.open(tmp_path / "pictures" / "00000.webp") as image:
        assert image.size == (64, 64)


def test_a_missing_package_says_how_to_get_it(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the package emoji-data.*npm pack"):
        build_data(tmp_path, tmp_path / "data")


def test_captions_run_from_the_group_to_tone_and_style() -> None:
    entry = Entry("x", "woman firefighter", "people and body", "person role", "dark", "noto")
    assert caption(entry, "group", tone=False, style=False) == "people and body"
    assert caption(entry, "subgroup", style=False) == "person role with dark skin"
    assert caption(entry) == "woman firefighter with dark skin in noto style"
    draw = random.Random(0)
    drawn = {random_caption(entry, draw) for _ in range(500)}
    assert {"people and body", "person role in noto style", "firefighter", caption(entry)} <= drawn
    assert sum(WIDTHS.values()) == pytest.approx(1)


def test_full_captions_are_asked_more_at_last() -> None:
    entry = Entry("x", "woman firefighter", "people and body", "person role", "dark", "noto")
    shares = []
    for full_share in (0.0, 0.35, 1.0):
        draw = random.Random(0)
        drawn = [random_caption(entry, draw, full_share) for _ in range(2_000)]
        shares.append(drawn.count(caption(entry)) / len(drawn))
    usual = WIDTHS["name"] * TELL_TONE["name"] * TELL_STYLE
    expected = [usual, 0.35 + 0.65 * usual, 1.0]
    assert shares == pytest.approx(expected, abs=0.04)


def test_styles_share_a_caption_unless_it_names_one() -> None:
    fluent, noto = (Entry("x", "red apple", "food", "fruit", None, s) for s in ("fluent", "noto"))
    assert caption(fluent, style=False) == caption(noto, style=False) == "red apple"
    assert caption(fluent) != caption(noto)


def test_held_out_combinations_are_of_persons_whose_other_tones_are_seen() -> None:
    keys = sorted(emoji_data.held_out_keys())
    assert len(keys) >= 100
    tones = {"light", "medium light", "medium", "medium dark", "dark"}
    for key in keys:
        base, _, rest = key.partition(" ")
        tone, style = rest.rsplit(" ", 1)
        assert (tone in tones, style in ("fluent", "noto")) == (True, True)
        others = {k for k in keys if k.startswith(base + " ")}
        assert len(others) <= 2  # one tone, in one style or both
