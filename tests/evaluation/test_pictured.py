"""`evaluate` on pipelines that read pictures beside the prompt: edits, masks, control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.test_evaluate import Corners, options
from PIL import Image, ImageDraw
from support.runs import teacher_dir

from stepdistill.evaluation.pictured import pictured_prompts
from stepdistill.evaluation.run import evaluate
from stepdistill.testing.tiny import TINY_FAMILY

READING = [n for n, f in TINY_FAMILY.items() if any(f.reads.values()) and f.output == "images"]
SIZED_BY_PICTURE = ("instruct_pix2pix", "sd_upscale")


def folder_of(
    folder: Path, column: str = "file_name", masks: bool = True, left: bool = False
) -> Path:
    """Two pictures, each with a mask of a half."""
    folder.mkdir()
    rows = []
    for index, colour in enumerate([(200, 40, 30), (20, 60, 220)]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{index}.png")
        mask = Image.new("L", (32, 32))
        ImageDraw.Draw(mask).rectangle((0, 0, 15, 31) if left else (16, 0, 31, 31), fill=255)
        mask.save(folder / f"mask{index}.png")
        row = {column: f"{index}.png", "text": f"thing {index}"}
        rows.append({**row, "mask_file_name": f"mask{index}.png"} if masks else row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(family: str, folder: Path, out: Path, factory: Any) -> Any:
    more: dict[str, Any] = {"prompts_file": None, "first_frames": str(folder)}
    more |= {"steps": [2], "teacher_steps": [3]}  # Qwen's own scheduler has no single step
    if family not in SIZED_BY_PICTURE:  # by default a megapixel
        more["resolution"] = 32
    return evaluate(options(teacher_dir(family, factory), folder, out, **more), [Corners()])


@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    READING,
)
def test_a_pipeline_that_reads_pictures_is_evaluated(family, tmp_path, tmp_path_factory) -> None:
    made = evaluated(family, folder_of(tmp_path / "a"), tmp_path / "out", tmp_path_factory)
    assert made.systems[1].get("frechet", "corners", "teacher").mean > 0
    assert made.protocol["num_prompts"] == 2


@pytest.mark.parametrize(
    "family", ["instruct_pix2pix", pytest.param("sd_upscale", marks=pytest.mark.full)]
)
def test_a_size_that_pictures_decide_is_not_asked_for(family, tmp_path, tmp_path_factory) -> None:
    folder, teacher = folder_of(tmp_path / "a"), teacher_dir(family, tmp_path_factory)
    more: dict[str, Any] = {"prompts_file": None, "first_frames": str(folder), "resolution": 32}
    with pytest.raises(ValueError, match="resolution: expected none beside StableDiffusion"):
        evaluate(options(teacher, folder, tmp_path / "out", **more), [Corners()])


@pytest.mark.full
def test_another_mask_is_another_set(tmp_path, tmp_path_factory) -> None:
    distances = {
        left: evaluated(
            "sd_inpaint",
            folder_of(tmp_path / str(left), left=left),
            tmp_path / f"out{left}",
            tmp_path_factory,
        )
        .systems[1]
        .get("frechet", "corners", "teacher")
        .mean
        for left in (False, True)
    }
    assert distances[False] != distances[True]


def test_a_training_folder_will_do(tmp_path) -> None:
    """Its file_name is what the image is to become; the one to edit stands beside it."""
    folder = folder_of(tmp_path / "train", "conditioning_file_name")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    target = [{**line, "file_name": "mask0.png"} for line in lines]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in target))
    made = pictured_prompts(str(folder), {"image": True})
    assert [one.images[0].name for one in made] == ["0.png", "1.png"]
    assert {one.mask for one in made} == {None}
    (told, *_) = (one.call("control_image") for one in made)
    assert (told["prompt"], told["control_image"].size) == ("thing 0", (32, 32))


def test_masks_are_asked_of_those_that_repaint(tmp_path, tmp_path_factory) -> None:
    folder = folder_of(tmp_path / "plain", masks=False)
    with pytest.raises(ValueError, match=r"jsonl:1: expected .*mask_file_name"):
        evaluated("sd_inpaint", folder, tmp_path / "out", tmp_path_factory)
    assert not (tmp_path / "out").exists()
