"""`evaluate` on pipelines that make videos: frames, movement, first frames, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.test_evaluate import Corners, Page, brightness, options
from PIL import Image
from support.runs import teacher_dir

from stepdistill.evaluation.images import eight_bit
from stepdistill.evaluation.metrics import set_distances
from stepdistill.evaluation.pictured import Pictured, pictured_prompts
from stepdistill.evaluation.report import Report
from stepdistill.evaluation.run import evaluate
from stepdistill.evaluation.samples import PipelineSampler
from stepdistill.evaluation.store import Store
from stepdistill.evaluation.videos import (
    frame_distance,
    frame_indices,
    motion,
    per_video,
    shown_of,
)
from stepdistill.families.registry import load_family


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return teacher_dir("wan", tmp_path_factory)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red cube\na blue ball\n")
    return file


@pytest.fixture(scope="module")
def report(wan, prompts, tmp_path_factory) -> Report:
    out = tmp_path_factory.mktemp("videos")
    given = options(wan, prompts, out, frames="3", num_previews=6)
    return evaluate(given, [Corners()], {"brightness": brightness})


def stored(report: Report, name: str) -> dict[str, torch.Tensor]:
    (folder,) = (report.folder / "features").glob(f"{name}-*")
    return Store(folder, 4, 4).read()[0]


def test_frames_that_are_seen() -> None:
    assert frame_indices("first", 81) == [0]
    assert frame_indices("all", 3) == [0, 1, 2]
    assert frame_indices("4", 10) == [0, 3, 6, 9]
    assert frame_indices("9", 5) == [0, 1, 2, 3, 4]
    assert [shown_of(choice) for choice in ("first", "all", "4", "81")] == [1, 6, 4, 6]


def test_motion_is_the_mean_step_of_a_pixel() -> None:
    """A grey video that brightens by 51 / 255 a frame in one half of it."""
    frames = torch.zeros(3, 4, 4, 3)
    frames[1, :2], frames[2, :2] = 0.2, 0.4
    assert float(motion(eight_bit(frames))) == pytest.approx(0.1)
    assert float(motion(eight_bit(frames[:1]))) == 0.0


def test_frame_distance_is_between_neighbours() -> None:
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]])
    assert frame_distance(features) == 2.5
    assert frame_distance(features[:, :1]) is None
    assert frame_distance(features[0]) is None  # images


def test_videos_are_as_far_apart_as_their_frames() -> None:
    two = torch.stack([torch.zeros(3, 2), torch.tensor([3.0, 4.0]).expand(3, 2)])
    assert float(torch.pdist(per_video(two))) == pytest.approx(5.0)


@pytest.mark.full
def test_every_row_has_frames_quality_and_movement(report) -> None:
    teacher, student = report.systems
    own, base = stored(report, "student_1"), stored(report, "teacher_2")
    assert own["features/corners"].shape == (4, 3, 12)
    assert own["score/brightness"].shape == (4, 3)
    frames = [x["features/corners"].flatten(0, 1) for x in (base, own)]
    expected = set_distances(*frames, 3)["frechet"]
    assert student.get("frechet", "corners", "teacher").mean == pytest.approx(expected)
    assert student.get("motion").mean == pytest.approx(float(own["motion"].double().mean()))
    ratio = student.get("motion").mean / teacher.get("motion").mean
    assert student.get("motion_drift").mean == pytest.approx(ratio - 1)
    assert student.get("frame_distance", "corners").mean > 0
    assert student.get("seconds_per_video").mean > 0
    assert student.get("seconds_per_image") is None
    assert (student.get("network_calls").mean, teacher.get("network_calls").mean) == (1, 2)


@pytest.mark.full
def test_report_shows_the_frames_of_a_video_in_a_line(report) -> None:
    assert [len(system.previews) for system in report.systems] == [6, 6]  # two videos of three
    assert all(Path(path).is_file() for path in report.systems[1].previews)
    page = Page()
    text = (report.folder / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.tags.count("img") == 2 * 2 + 1
    assert "From frame to frame" in text
    plain = json.loads((report.folder / "report.json").read_text())
    assert plain["protocol"]["frames"].startswith("3 at equal distances")
    assert "frames: 3 at equal" in (report.folder / "report.csv").read_text()


@pytest.mark.full
def test_a_video_is_the_stock_call_s(wan, report) -> None:
    """Frame for frame, of the number-keyed noise of its own."""
    from stepdistill.core.context import stable_seed

    family = load_family(wan)
    noise = torch.Generator().manual_seed(stable_seed("evaluate", 0, 0, 0))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, **family.call_extras}
    made = family.pipeline("a red cube", generator=noise, output_type="np", **call).frames[0]
    seen = [made[i] for i in frame_indices("3", len(made))]
    pixels = torch.stack([torch.from_numpy(frame) for frame in seen]).permute(0, 3, 1, 2)
    own = stored(report, "student_1")["features/corners"][0]
    torch.testing.assert_close(own, Corners()(pixels), rtol=0, atol=2e-3)  # of eight bits


def folder_of_first_frames(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for index, colour in enumerate([(200, 40, 30), (20, 60, 220)]):
        Image.new("RGB", (40, 20), colour).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"thing {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.full
def test_first_frames_are_each_video_s_own(tmp_path, tmp_path_factory) -> None:
    frames = pictured_prompts(str(folder_of_first_frames(tmp_path / "frames")), {"image": True})
    pipeline = load_family(teacher_dir("wan_i2v", tmp_path_factory))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, **pipeline.call_extras}
    del call["image"]
    sampler = PipelineSampler(pipeline.pipeline, call)

    def drawn(told: list[Pictured]) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(5) for _ in told]  # the same noise for both
        return sampler.draw(told, seeds).images

    both = drawn(frames)
    torch.testing.assert_close(drawn(frames[1:])[0], both[1], rtol=0, atol=0)
    assert float((both[0] - both[1]).abs().max()) > 1e-3


@pytest.mark.full
def test_image_to_video_end_to_end(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_i2v", tmp_path_factory)
    frames = folder_of_first_frames(tmp_path / "frames")
    more: dict[str, Any] = {"prompts_file": None, "first_frames": str(frames), "frames": "all"}
    made = evaluate(options(teacher, frames, tmp_path / "out", **more), [Corners()])
    assert made.systems[1].get("frechet", "corners", "teacher").mean > 0
    assert made.protocol["num_prompts"] == 2


@pytest.mark.parametrize(
    ("family", "more", "told"),
    [
        ("sd_v", {"frames": "3"}, "frames: expected it beside a pipeline that makes videos"),
        ("sd_v", {"first_frames": "x"}, "first_frames: expected it beside a pipeline that makes"),
        ("wan", {"frames": "some"}, "frames: expected first, all or a number of frames"),
        ("wan", {"first_frames": "x"}, "first_frames: expected no first frames beside"),
        ("wan_i2v", {}, "first_frames: expected a folder of first frames for"),
        ("wan_i2v", {"first_frames": "/nowhere"}, r"first_frames: expected a folder of images"),
    ],
)
def test_a_mistake_is_said_before_any_video(
    family, more, told, prompts, tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    with pytest.raises(ValueError, match=told):
        evaluate(options(teacher, prompts, tmp_path / "out", **more), [Corners()])
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_students_are_of_the_teacher_s_kind(wan, prompts, tmp_path, tmp_path_factory) -> None:
    given = options(teacher_dir("sd_v", tmp_path_factory), prompts, tmp_path, student=[str(wan)])
    with pytest.raises(ValueError, match="expected a pipeline that makes images, as the teacher"):
        evaluate(given, [Corners()])
