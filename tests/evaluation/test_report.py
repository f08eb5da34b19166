"""The protocol that a report's files tell beside each number, and a preset's name on it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.test_evaluate import Corners, brightness, options
from PIL import Image
from support.runs import teacher_dir

from stepdistill.evaluation.metrics import Number, System
from stepdistill.evaluation.options import Options
from stepdistill.evaluation.protocol import UNNAMED, preset_text, protocol_line
from stepdistill.evaluation.report import Report
from stepdistill.evaluation.run import evaluate
from stepdistill.reporting.values import Measured


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture(scope="module")
def given(teacher, tmp_path_factory) -> Options:
    """Three prompts, two images each; five real ones; the middle 8 of 16 px."""
    root = tmp_path_factory.mktemp("reported")
    (root / "prompts.txt").write_text("a red cube\na blue ball\na dog\n")
    (root / "real").mkdir()
    for index in range(5):
        Image.new("RGB", (16, 16), (50 * index, 90, 30)).save(root / "real" / f"{index}.png")
    more: dict[str, Any] = {"reference": str(root / "real"), "crop_px": 8, "guidance": None}
    more |= {"num_reference": 5, "batch_size": 2}
    return options(teacher, root / "prompts.txt", root / "out", **more)


@pytest.fixture(scope="module")
def report(given) -> Report:
    named = given.model_copy(update={"preset": "patch_fid"})
    return evaluate(named, [Corners()], {"brightness": brightness})


def rows(report: Report) -> dict[tuple[str, str, str], dict[str, str]]:
    """Of the CSV, by (group, metric, reference)."""
    with (report.folder / "report.csv").open(encoding="utf-8") as file:
        return {(r["group"], r["metric"], r["reference"]): r for r in csv.DictReader(file)}


@pytest.mark.full
def test_the_reference_beside_a_number_is_its_own(report) -> None:
    told = rows(report)
    real, teacher = (told["student", "frechet", name] for name in ("real", "teacher"))
    assert (real["num_reference"], teacher["num_reference"]) == ("5", "6")
    assert real["reference_set"].endswith("/real")
    assert teacher["reference_set"] == "the teacher at 2 steps, guidance the pipeline's own"
    assert told["teacher", "score", ""]["num_reference"] == ""


@pytest.mark.full
@pytest.mark.parametrize(
    ("group", "metric", "reference", "seen"),
    [
        ("student", "frechet", "real", "middle 8 px"),
        ("student", "diversity", "", "middle 8 px"),
        ("student", "score", "", "as made"),
        ("student", "saturation", "", "as made"),
        ("student", "contrast_drift", "teacher", "as made"),
        ("real", "saturation", "", "middle 8 px"),
    ],
)
def test_images_are_told_as_the_metric_sees_them(group, metric, reference, seen, report) -> None:
    assert rows(report)[group, metric, reference]["images"] == seen


def test_the_look_table_tells_framed_images_from_whole_ones(report) -> None:
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    look = page.split("<h2>Look</h2>")[1].split("</section>")[0]
    assert look.count('<td data-name="images">middle 8 px</td>') == 1
    assert look.count('<td data-name="images">as made</td>') == 2


def test_how_images_were_drawn_is_beside_every_number(report) -> None:
    told = rows(report)
    names = ("guidance", "dtype", "batch_size", "device", "num_prompts")
    assert [told["teacher", "frechet", "real"][name] for name in names] == [
        "the pipeline's own", "float32", "2", "cpu, 1 thread", "3",
    ]  # fmt: skip
    student = told["student", "frechet", "real"]["guidance"]
    assert student == "the export's own; 1 of other pipelines"
    assert [told["real", "contrast", ""][name] for name in names] == [""] * 5
    assert "teacher the pipeline&#x27;s own" in (report.folder / "report.html").read_text("utf-8")
    plain = json.loads((report.folder / "report.json").read_text())
    assert plain["protocol"]["guidance"] == "the pipeline's own"


@pytest.mark.full
def test_a_guidance_that_was_given_is_told(given, tmp_path) -> None:
    more = {"guidance": 3.5, "reference": None, "num_reference": None, "output_dir": str(tmp_path)}
    made = evaluate(given.model_copy(update=more), [Corners()])
    assert made.protocol["guidance"] == 3.5
    assert rows(made)["teacher", "diversity", ""]["guidance"] == "3.5"


@pytest.mark.full
def test_a_guidance_of_no_effect_is_not_told(tmp_path, tmp_path_factory) -> None:
    unconditional = teacher_dir("unet2d", tmp_path_factory)
    more: dict[str, Any] = {"prompts_file": None, "num_prompts": 2, "guidance": 4.0}
    made = evaluate(options(unconditional, tmp_path, tmp_path / "out", **more), [Corners()])
    assert made.protocol["guidance"] == "none"


def test_a_changed_preset_says_so_in_every_file(report) -> None:
    names = "num_prompts, crop_px, num_reference, num_images_per_prompt, features"
    changed = f"patch_fid, changed: {names}"
    assert report.protocol["preset"] == changed
    assert {row["preset"] for row in rows(report).values()} == {changed}
    assert changed in (report.folder / "report.html").read_text(encoding="utf-8")


def told_of(name: str, networks: list[str], against: str = "real", **more: Any) -> str | None:
    given = {"teacher": "a", "student": ["b"], "reference": "photos", **more}
    plain = Options(preset=name, **given).model_dump()
    return preset_text(plain, networks, against, 40_000)


def test_a_preset_s_name_alone_is_on_its_own_numbers() -> None:
    assert told_of("coco30k", ["inception"]) == "coco30k"
    assert told_of("coco5k", ["inception"]) == "coco5k"
    assert told_of("patch_fid", ["inception"], "teacher", reference=None) == "patch_fid"


@pytest.mark.parametrize(
    ("networks", "against", "more", "changed"),
    [
        (["inception"], "real", {"num_prompts": 3}, "num_prompts"),
        (["inception"], "real", {"num_images_per_prompt": 2}, "num_images_per_prompt"),
        (["inception"], "real", {"crop_px": 64}, "crop_px"),
        (["dino"], "real", {}, "features"),
        (["inception", "dino"], "real", {}, "features (dino)"),
        (["inception"], "teacher", {}, "reference"),
    ],
)
def test_what_a_preset_does_not_say_is_told(networks, against, more, changed) -> None:
    assert told_of("coco30k", networks, against, **more) == f"coco30k, changed: {changed}"


def test_several_changes_of_a_preset_are_all_told() -> None:
    plain = Options(preset="coco30k", teacher="a", student=["b"], num_prompts=3).model_dump()
    told = preset_text(plain, ["dino"], "teacher", 0)
    assert told == "coco30k, changed: num_prompts, features, no reference"


def test_too_few_real_images_change_a_preset() -> None:
    plain = Options(preset="coco5k", teacher="a", student=["b"], reference="photos").model_dump()
    assert preset_text(plain, ["inception"], "real", 9) == "coco5k, changed: num_reference"


def test_what_presets_do_not_name_is_the_options_own() -> None:
    plain = Options(teacher="a", student=["b"]).model_dump()
    assert {name: plain[name] for name in UNNAMED} == UNNAMED


def test_a_scorer_of_a_network_s_name_has_its_own_weights(report) -> None:
    facts = {
        **report.protocol,
        "networks": {"clip": {"weights": "of the features", "preprocess": "224 px"}},
        "scorers": {"clip": "of the score"},
    }
    row = System("a", "student", 1, [], 6)
    line = protocol_line(facts, "real", row, Number("score", Measured(1.0, 0.0), "clip"))
    assert (line["weights"], line["preprocess"]) == ("of the score", "")
