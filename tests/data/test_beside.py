"""Images beside the one an item becomes: conditioning and mask columns, in every form of data."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.samples import number_of, png

from stepdistill.core.types import CONDITIONING, MASK
from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.metadata import beside_columns

EDIT = beside_columns({CONDITIONING: True})
INPAINT = beside_columns({CONDITIONING: True, MASK: True})
MAY = beside_columns({CONDITIONING: False})


def folder_of(folder: Path, *rows: dict[str, Any], files: int = 6) -> Path:
    folder.mkdir()
    for number in range(files):
        (folder / f"{number}.png").write_bytes(png(40 * number))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize(
    ("target", "column", "text"),
    [
        ("file_name", "conditioning_file_name", "text"),
        ("image", "cond_image", "caption"),  # Diffusers' img2img scripts
        ("edited_image", "original_image", "edit_prompt"),  # InstructPix2Pix
        ("image_path", "control_path", "caption"),  # musubi-tuner
        ("image", "conditioning_image", "text"),  # Diffusers' ControlNet script
    ],
)
def test_columns_as_users_call_them(tmp_path, target, column, text) -> None:
    row = {target: "1.png", column: "2.png", text: "redder"}
    item = ImageFolderDataset(folder_of(tmp_path / "d", row), None, beside=EDIT)[0]
    assert (item["prompt"], number_of(item["image"])) == ("redder", 40)
    assert (number_of(item[CONDITIONING]), item[CONDITIONING].shape) == (80, (3, 8, 8))


def test_several_a_mask_and_no_image_to_become(tmp_path) -> None:
    row = {"conditioning_file_name": ["0.png", "3.png"], "mask": "5.png", "text": "both"}
    data = ImageFolderDataset(folder_of(tmp_path / "d", row, row), 4, beside=INPAINT)
    item = data[1]
    assert set(item) == {"prompt", CONDITIONING, MASK}
    assert item[CONDITIONING].shape == (2, 3, 4, 4)
    assert [number_of(image) for image in item[CONDITIONING]] == [0, 120]
    assert item[MASK].shape == (1, 4, 4)
    assert float(item[MASK].mean()) == pytest.approx(200 / 255, abs=1e-6)


def test_a_table_has_them_too(tmp_path) -> None:
    folder = folder_of(tmp_path / "d")
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text", "edit_image"], ["1.png", "a", "4.png"]])
    item = ImageFolderDataset(folder, None, beside=EDIT)[0]
    assert [number_of(item[key]) for key in ("image", CONDITIONING)] == [40, 160]


def test_where_they_may_be_missing_the_first_row_decides(tmp_path) -> None:
    without = {"file_name": "1.png", "text": "a"}
    data = ImageFolderDataset(folder_of(tmp_path / "a", without), None, beside=MAY)
    assert set(data[0]) == {"prompt", "image", "content"}
    row = {**without, "conditioning_file_name": "2.png"}
    data = ImageFolderDataset(folder_of(tmp_path / "b", row), None, beside=MAY)
    assert number_of(data[0][CONDITIONING]) == 80
    with pytest.raises(ValueError, match=r"jsonl:2: expected an object with .*conditioning_file"):
        ImageFolderDataset(folder_of(tmp_path / "c", row, without), None, beside=MAY)


def test_the_fingerprint_knows_them(tmp_path) -> None:
    rows = [{"file_name": "1.png", "text": "a", "cond_image": f"{n}.png"} for n in (2, 3)]
    data = [
        ImageFolderDataset(folder_of(tmp_path / f"{n}" / "d", row), None, beside=EDIT)
        for n, row in enumerate(rows)
        if (tmp_path / f"{n}").mkdir() is None
    ]
    assert data[0].fingerprint() != data[1].fingerprint()
    plain = [ImageFolderDataset(tmp_path / f"{n}" / "d", None).fingerprint() for n in (0, 1)]
    assert plain[0] == plain[1]


ROW = {"file_name": "1.png", "text": "a", "conditioning_file_name": "2.png", "mask": "3.png"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mask": None}, r"jsonl:2: expected an object with .*mask_file_name, got columns"),
        ({"conditioning_file_name": None}, r"--data\.conditioning_column"),
        ({"mask": "9.png"}, r"jsonl:2: expected every file to exist, got no .*9\.png"),
        ({"conditioning_file_name": "../x.png"}, r"jsonl:2: expected files inside"),
        ({"conditioning_file_name": ["1.png", "2.png"]}, r"jsonl:2: expected 1 image in cond"),
        ({"conditioning_file_name": []}, r"jsonl:2: expected the name of a file, or a list"),
        ({"mask": 3}, r"jsonl:2: expected the name of a file, .* got 3 \(int\)"),
    ],
)
def test_what_is_wrong_has_a_line(tmp_path, row, message) -> None:
    wrong = {key: value for key, value in {**ROW, **row}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as raised:
        ImageFolderDataset(folder_of(tmp_path / "d", ROW, wrong), None, beside=INPAINT)
    assert "\n" not in str(raised.value)


def test_captions_in_files_of_their_own_are_not_enough(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected .*jsonl with text and conditioning_file_name"):
        ImageFolderDataset(tmp_path, None, beside=EDIT)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_datasets_library(tmp_path, streaming) -> None:
    pictures = [{"bytes": png(40 * n), "path": None} for n in range(4)]
    features = datasets.Features(
        {
            "edited_image": datasets.Image(),
            "edit_prompt": datasets.Value("string"),
            "input_image": datasets.List(datasets.Image()),
        }
    )
    rows = {"edited_image": pictures[:1], "edit_prompt": ["a"], "input_image": [pictures[1:3]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
    found = load_rows(str(tmp_path / "d"), streaming=streaming)
    data: Any = (HubStream if streaming else HubDataset)(found, None, "image", "text", beside=EDIT)
    item = data.first() if streaming else data[0]
    assert (item["prompt"], number_of(item["image"])) == ("a", 0)
    assert [number_of(image) for image in item[CONDITIONING]] == [40, 80]
    found = load_rows(str(tmp_path / "d"), streaming=streaming)
    with pytest.raises(ValueError, match=r"mask_column: expected one of .*--data\.mask_column"):
        (HubStream if streaming else HubDataset)(found, None, "image", "text", beside=INPAINT)


def test_masks_and_images_of_another_size_are_cut_alike() -> None:
    from stepdistill.data.decode import decode_beside

    made = decode_beside(
        {CONDITIONING: [(png(8), "a"), (png(9), "b")], MASK: [(png(255), "m")]}, 16
    )
    assert {key: value.shape for key, value in made.items()} == {
        CONDITIONING: torch.Size([2, 3, 16, 16]),
        MASK: torch.Size([1, 16, 16]),
    }
