"""`stepdistill evaluate` end to end on a tiny teacher: seeds, resume, report, mistakes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.processes import LIMIT_S
from support.runs import teacher_dir
from torch import Tensor

from stepdistill.cli import main
from stepdistill.demo.classifier import register_digits
from stepdistill.evaluation.collect import Drawing, preview_indices
from stepdistill.evaluation.options import Options
from stepdistill.evaluation.report import Report
from stepdistill.evaluation.run import evaluate
from stepdistill.evaluation.samples import PipelineSampler
from stepdistill.evaluation.store import Store
from stepdistill.families.registry import load_family


class Corners:
    """A feature network with nothing to load: the four corners' means of each channel."""

    name = "corners"
    facts: dict[str, str] = {"weights": "none", "preprocess": "as made"}  # noqa: RUF012

    def preprocess(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def brightness(images: Tensor, by: Sequence[str]) -> Tensor:
    assert all(isinstance(prompt, str) for prompt in by)
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red cube\na blue ball\n<b>&\n")
    return file


def options(teacher: Path, prompts: Path, out: Path, **more: Any) -> Options:
    given = {
        "teacher": str(teacher),
        "student": [str(teacher)],
        "steps": [1],
        "teacher_steps": [2],
        "guidance": 1.0,
        "prompts_file": str(prompts),
        "num_images_per_prompt": 2,
        "shard_images": 4,
        "num_previews": 4,
        "output_dir": str(out),
    }
    return Options(**{**given, **more})


@pytest.fixture(scope="module")
def report(teacher, prompts, tmp_path_factory) -> Report:
    out = tmp_path_factory.mktemp("evaluated")
    return evaluate(options(teacher, prompts, out), [Corners()], {"brightness": brightness})


@pytest.mark.full
def test_a_network_that_can_t_read_the_teacher_s_images_is_refused_before_one_is_drawn(
    teacher, prompts, tmp_path
) -> None:
    register_digits()
    with pytest.raises(ValueError, match="features digits: expected grey images of 8 x 8 px"):
        evaluate(options(teacher, prompts, tmp_path / "out", features=["digits"]))
    assert not (tmp_path / "out").exists()


def test_a_user_s_file_without_that_network_is_refused_before_an_image_is_drawn(
    teacher, prompts, tmp_path
) -> None:
    (tmp_path / "nets.py").write_text("Mean = 0.5")
    with pytest.raises(ValueError, match=r"features: expected Mean in .*nets\.py"):
        evaluate(options(teacher, prompts, tmp_path / "out", features=[f"{tmp_path}/nets.py:Mean"]))
    assert not (tmp_path / "out").exists()


def features(report: Report, name: str) -> Tensor:
    (folder,) = (report.folder / "features").glob(f"{name}-*")
    return Store(folder, 6, 4).read()[0]["features/corners"]


def test_every_row_carries_quality_and_cost(report) -> None:
    teacher, student = report.systems
    assert (teacher.group, teacher.steps, student.group, student.steps) == (
        "teacher",
        2,
        "student",
        1,
    )
    assert teacher.get("frechet") is None  # a set against itself
    assert student.get("frechet", "corners", "teacher").mean > 0
    assert student.get("network_calls").mean == 1
    assert teacher.get("network_calls").mean == 2
    assert student.get("diversity", "corners").mean > 0
    assert student.get("seconds_per_image").mean > 0
    assert student.get("peak_memory_gib").mean > 0.1
    assert -1 < student.get("score", "brightness").mean < 1
    assert teacher.get("contrast_drift") is None
    ratio = student.get("contrast").mean / teacher.get("contrast").mean
    assert student.get("contrast_drift").mean == pytest.approx(ratio - 1)


@pytest.mark.full
def test_an_image_depends_on_neither_batch_nor_neighbours(
    report, teacher, prompts, tmp_path
) -> None:
    other = evaluate(options(teacher, prompts, tmp_path, batch_size=1, shard_images=4), [Corners()])
    torch.testing.assert_close(features(other, "student_1"), features(report, "student_1"))


def test_prompts_are_seen_from_different_noise(report) -> None:
    first, second = features(report, "student_1")[:2]
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.full
def test_a_killed_evaluation_draws_only_what_is_missing(
    report, teacher, prompts, monkeypatch
) -> None:
    before = features(report, "student_1")
    (folder,) = (report.folder / "features").glob("student_1-*")
    (folder / "shard_0000004.safetensors").unlink()
    (folder / ".shard_0000004.safetensors.1.stepdistill-tmp").write_text("half")
    drawn = []
    stock = PipelineSampler.draw

    def draw(self: PipelineSampler, told: Sequence[Any], generator: Any) -> Any:
        drawn.append(len(told))
        return stock(self, told, generator)

    monkeypatch.setattr(PipelineSampler, "draw", draw)
    again = evaluate(
        options(teacher, prompts, report.folder), [Corners()], {"brightness": brightness}
    )
    assert drawn == [2]
    torch.testing.assert_close(features(again, "student_1"), before)


def test_csv_has_the_protocol_beside_every_number(report) -> None:
    with (report.folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(system.numbers) for system in report.systems)
    told = next(row for row in rows if row["metric"] == "frechet")
    assert (told["num_prompts"], told["num_images_per_prompt"], told["seeds"]) == ("3", "2", "0")
    assert (told["network"], told["preprocess"], told["images"]) == ("corners",) + ("as made",) * 2
    assert "torch " in told["versions"]


def test_json_holds_the_numbers(report) -> None:
    plain = json.loads((report.folder / "report.json").read_text())
    assert [one["label"] for one in plain["systems"]] == [one.label for one in report.systems]
    assert plain["protocol"]["options"]["teacher_steps"] == [2]


class Page(HTMLParser):
    """Open tags, addresses and texts; asserts that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_nests_and_fetches_nothing(report) -> None:
    page = Page()
    page.feed((report.folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("figure") == 2
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags


def test_png_shows_a_strip_for_each(report) -> None:
    with Image.open(report.folder / "report.png") as image:
        assert image.width > 1000
    assert [len(system.previews) for system in report.systems] == [4, 4]


def test_previews_are_of_as_many_prompts_as_there_are() -> None:
    assert preview_indices(Drawing("abc", 2, 0, 1, 4)) == [0, 1, 2, 4]


@pytest.mark.full
def test_real_images_become_the_reference(teacher, prompts, tmp_path) -> None:
    (tmp_path / "real").mkdir()
    for index in range(5):
        Image.new("RGB", (16, 16), (50 * index, 90, 30)).save(tmp_path / "real" / f"{index}.png")
    made = evaluate(
        options(teacher, prompts, tmp_path / "out", reference=str(tmp_path / "real"), size_px=8),
        [Corners()],
    )
    real, teacher_row, student = made.systems
    assert (real.group, made.reference, real.num_images) == ("real", "real", 5)
    assert teacher_row.get("frechet", "corners", "real").mean > 0
    assert student.get("frechet", "corners", "teacher").mean > 0
    assert made.protocol["frame"] == "square to 8 px, lanczos"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--features", "digits", "--num_prompts", "9"],
            "num_prompts: expected at most the 3 lines",
        ),
        ([], "features: expected a feature network, got none"),
        (["--features", "resnet:a"], "features: expected digits, inception:FILE"),
        (
            ["--features", "digits", "--reference", "nowhere"],
            "reference: expected a file or folder",
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_image(flags, told, teacher, prompts, tmp_path) -> None:
    command = ["evaluate", "--teacher", str(teacher), "--student", str(teacher)]
    command += ["--prompts_file", str(prompts), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=told):
        main([*command, "--steps", "1", *flags])
    assert not (tmp_path / "out").exists()


def test_a_preset_gives_defaults_that_flags_override() -> None:
    assert Options(preset="coco30k", teacher="a", student=["b"]).num_prompts == 30_000
    assert Options(preset="patch_fid", teacher="a", student=["b"]).crop_px == 299
    assert Options(preset="coco5k", teacher="a", student=["b"], size_px=64).size_px == 64


def test_noise_between_steps_is_each_image_s_own(tmp_path_factory) -> None:
    """DiT's pipeline passes no generator on to its scheduler: ours reaches it."""
    from diffusers import LCMScheduler

    family = load_family(teacher_dir("dit", tmp_path_factory))
    family.pipeline.scheduler = LCMScheduler.from_config(family.pipeline.scheduler.config)
    sampler = PipelineSampler(
        family.pipeline, {"num_inference_steps": 2, "guidance_scale": 1}, "label"
    )

    def own(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = sampler.draw([0, 1], [own(0), own(1)]).images
    torch.manual_seed(7)  # global randomness has no say
    alone = sampler.draw([1], [own(1)]).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_two_processes_make_the_numbers_of_one(report, teacher, prompts, tmp_path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from accelerate import PartialState\n"
        "from evaluation.test_evaluate import Corners, brightness, options\n"
        "from stepdistill.evaluation.run import evaluate\n"
        f"given = options({str(teacher)!r}, {str(prompts)!r}, {str(tmp_path / 'out')!r})\n"
        "evaluate(given, [Corners()], {'brightness': brightness})\n"
        "assert PartialState().num_processes == 2\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    port = str(29500 + os.getpid() % 400)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--master_port", port, str(script)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {
        n["metric"]: n["spread"]["mean"]
        for n in plain["systems"][1]["numbers"]
        if n["reference"] == "teacher"
    }
    expected = report.systems[1].get("frechet", "corners", "teacher").mean
    assert found["frechet"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_alone_is_drawn_at_its_step_counts(teacher, prompts, tmp_path, capsys) -> None:
    command = ["evaluate", "--teacher", str(teacher), "--prompts_file", str(prompts)]
    command += ["--features", "evaluation.test_features:Mean", "--num_images_per_prompt", "2"]
    command += ["--guidance", "1", "--teacher_steps", "1", "3", "--output_dir", str(tmp_path)]
    main(command)
    made = json.loads((tmp_path / "report.json").read_text())
    systems = [(one["group"], one["steps"]) for one in made["systems"]]
    assert systems == [("teacher", 1), ("teacher", 3)]
    assert "students" not in (tmp_path / "report.html").read_text().split("</h1>")[0]
    assert "teacher, 3 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"steps: .* beside --student, got \[2\] alone"):
        main([*command, "--steps", "2"])


@pytest.mark.full
def test_more_previews_than_were_made_are_no_mistake(report, teacher, prompts, tmp_path) -> None:
    first = evaluate(options(teacher, prompts, tmp_path, num_previews=2), [Corners()])
    again = evaluate(options(teacher, prompts, tmp_path, num_previews=4), [Corners()])
    assert [len(one.previews) for one in again.systems] == [2, 2]
    assert again.systems[1].get("frechet").mean == first.systems[1].get("frechet").mean
    none = evaluate(options(teacher, prompts, tmp_path / "none", num_previews=0), [Corners()])
    assert all(not one.previews for one in none.systems)


@pytest.mark.full
def test_the_protocol_tells_how_the_images_were_drawn(teacher, prompts, tmp_path) -> None:
    first = evaluate(options(teacher, prompts, tmp_path, batch_size=2), [Corners()]).protocol
    assert (first["batch_size"], first["device"], first["drawn_at"]) == (
        "2", "cpu, 1 thread", "16 x 16 px",
    )  # fmt: skip
    more = options(teacher, prompts, tmp_path, batch_size=1, teacher_steps=[2, 3])
    assert evaluate(more, [Corners()]).protocol["batch_size"] == "2, 1"


@pytest.mark.full
def test_a_student_of_no_numbers_is_named(teacher, prompts, tmp_path, tmp_path_factory) -> None:
    broken = tmp_path_factory.mktemp("broken") / "student"
    pipeline = load_family(teacher).pipeline
    for param in pipeline.transformer.parameters():
        param.data.fill_(float("nan"))
    pipeline.save_pretrained(broken)
    with pytest.raises(ValueError, match="student at 1 step: expected finite images, got NaN"):
        evaluate(options(teacher, prompts, tmp_path, student=[str(broken)]), [Corners()])


@pytest.mark.full
def test_other_photos_of_the_same_names_and_sizes_are_read(teacher, prompts, tmp_path) -> None:
    found = []
    for colour in ("red", "blue"):
        folder = tmp_path / colour
        folder.mkdir()
        for index in range(4):
            Image.new("RGB", (16, 16), colour).save(folder / f"{index}.bmp")
        given = options(teacher, prompts, tmp_path / "out", reference=str(folder))
        found.append(evaluate(given, [Corners()]).systems[1].get("frechet", reference="real").mean)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"batch_size": -1}, "batch_size: expected 1 or more, got -1"),
        ({"shard_images": 0}, "shard_images: expected 1 or more, got 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected 1 or more, got 0"),
        ({"nearest_k": 0}, "nearest_k: expected 1 or more, got 0"),
        ({"teacher_steps": [0, 2]}, r"teacher_steps: expected 1 or more, got \(0, 2\)"),
        ({"num_reference": -1}, "num_reference: expected 1 or more, got -1"),
        ({"num_previews": -1}, "num_previews: expected 0 or more, got -1"),
        ({"num_images_per_prompt": 1, "num_prompts": 1}, "two images or more to measure a spread"),
        ({"features": ["dino:a", "dino:b"]}, "networks of different kinds, got dino twice"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(more, told, teacher, prompts, tmp_path) -> None:
    nets = None if "features" in more else [Corners()]
    with pytest.raises(ValueError, match=told):
        evaluate(options(teacher, prompts, tmp_path / "out", **more), nets)
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_no_class_number_is_named(tmp_path, tmp_path_factory) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("1\ncat\n")
    dit = teacher_dir("dit", tmp_path_factory)
    with pytest.raises(ValueError, match=r"prompts_file: .* got 'cat' in line 2"):
        evaluate(options(dit, labels, tmp_path / "out", student=[], steps=[]), [Corners()])
