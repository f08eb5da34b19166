"""The report of a folder: earlier layouts, failures as rows, and pages that stand alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation.test_evaluate import Page
from PIL import Image

from stepdistill.cli import main
from stepdistill.comparison.budget import Budget
from stepdistill.comparison.report import write
from stepdistill.comparison.runs import write_plan
from stepdistill.comparison.user_options import UserOptions


def row(label: str, group: str, steps: int | None, frechet: float) -> dict[str, Any]:
    digit = [[[0.5 if x == y else -1.0 for x in range(8)] for y in range(8)]]
    return {
        "label": label,
        "group": group,
        "steps": steps,
        "frechet": {"mean": frechet, "std": 0.3},
        "frechet_pixels": {"mean": 1.0, "std": 0.1},
        "recall": {"mean": 0.85, "std": 0.01},
        "accuracy": {"mean": 0.97, "std": 0.01},
        "network_calls": None if steps is None else float(steps),
        "seconds_per_image": None if steps is None else 0.001,
        "previews": [digit] * 4,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """As the benchmark of earlier versions left it: no plan, no budget, no data."""
    base = [row("real (train)", "real", None, 1.3), row("teacher", "teacher", 1, 40.0)]
    base.append(row("teacher", "teacher", 50, 2.0))
    (tmp_path / "teacher_rows.json").write_text(json.dumps(base))
    (tmp_path / "pairs_seconds.json").write_text("12.0")
    (tmp_path / "results").mkdir()
    for seed, frechet in enumerate((2.0, 2.2)):
        facts = {"updates": [10, 40], "cpu_seconds": 61.0, "seconds": 60.0, "seed": seed}
        content = {**facts, "rows": [row("dmd2", "student", 1, frechet)]}
        (tmp_path / "results" / f"dmd2_1_seed{seed}.json").write_text(json.dumps(content))
    (tmp_path / "failures").mkdir()
    failure = {"recipe": "pcm", "steps": [2], "seed": 0, "error": "ValueError: a | <b>"}
    (tmp_path / "failures" / "pcm_2_seed0.json").write_text(json.dumps(failure))
    return tmp_path


def test_command_without_a_budget_renders_what_is_there(folder, capsys) -> None:
    main(["compare", "--output_dir", str(folder)])
    told = capsys.readouterr().out
    assert "| dmd2 | 2.10 ± 0.14 (0.85) |" in told
    assert "| teacher | 40.00 (0.85) |" in told
    assert "| pcm for 2, seed 0: failed | ValueError: a \\| &lt;b> |" in told
    assert "- Take dmd2 at 1 step: the fewest steps within 10%" in told
    assert "teacher at 50 steps 2.00 (0.85)" in told


@pytest.mark.full
def test_files_hold_the_table_and_the_failure(folder) -> None:
    write(folder)
    plain = json.loads((folder / "results.json").read_text())
    assert [(one["recipe"], one["steps"]) for one in plain["table"]] == [("dmd2", 1)]
    assert plain["runs"][0]["updates"] == [10, 40]
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["recipe"], float(rows[0]["frechet"])) == ("dmd2", 2.1)
    assert (rows[1]["recipe"], rows[1]["error"]) == ("pcm", "ValueError: a | <b>")


@pytest.mark.full
def test_page_stands_alone_and_picture_has_a_row_for_each(folder) -> None:
    write(folder)
    page = Page()
    text = (folder / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert page.tags.count("figure") == 3  # the teacher twice, dmd2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "a | &lt;b&gt;" in text
    with Image.open(folder / "samples.png") as image:
        assert image.height > 500


def test_a_folder_without_a_comparison_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"output_dir: expected a comparison"):
        main(["compare", "--output_dir", str(tmp_path)])


def test_an_earlier_folder_goes_on_at_its_own_budget_alone(folder) -> None:
    with pytest.raises(ValueError, match=r"expected runs of 30s .* got some of 60s"):
        write_plan(folder, "digits", {}, Budget(seconds=30.0), {})
    write_plan(folder, "digits", {}, Budget(seconds=60.0), {})
    with pytest.raises(ValueError, match="the same budget"):
        write_plan(folder, "digits", {}, Budget(seconds=30.0), {})


def test_folders_are_the_same_however_they_are_written(tmp_path, monkeypatch) -> None:
    for name in ("a", "b", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "copy.txt").write_text("a cat")

    def plan(teacher: str, features: list[str], prompts: str = "prompts.txt") -> None:
        settled = UserOptions(teacher, prompts, features).settled()
        write_plan(tmp_path / "out", "own", {}, Budget(seconds=30.0), settled)

    monkeypatch.chdir(tmp_path)
    plan("a", ["b/", "fid"])
    plan("./a/", ["link", "fid"], "copy.txt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan(str(tmp_path / "a"), ["../b", "fid"], "../copy.txt")
    with pytest.raises(ValueError, match="the same features"):
        plan("../a", ["../a", "fid"], "../copy.txt")
    (tmp_path / "a" / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(ValueError, match="the same teacher"):  # the same text, another folder
        plan("a", ["../b", "fid"], "../copy.txt")


def test_paths_of_an_earlier_version_are_read_as_they_were_typed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "p.txt").write_text("a cat")
    options = UserOptions("a", "p.txt", ["fid"])
    old = {**options.settled(), "teacher": "a/", "prompts_file": "p.txt"}
    write_plan(tmp_path / "out", "own", {}, Budget(seconds=30.0), old)
    write_plan(tmp_path / "out", "own", {}, Budget(seconds=30.0), options.settled())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--methods", "dmd2"], "budget: expected such as 240s beside --methods"),
        (["--budget", "5steps", "--guidance", "2"], "guidance: expected it beside --teacher alone"),
        (["--budget", "5steps", "--teacher", "me/x"], "prompts_file: expected it beside --teacher"),
        (["--budget", "5 hours"], "budget: expected such as 240s or 500steps"),
    ],
)
def test_a_mistake_is_one_line(flags, told, tmp_path) -> None:
    with pytest.raises(SystemExit, match=told):
        main(["compare", "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_pictures_are_found_from_anywhere_and_gone_ones_left_out(
    folder, tmp_path_factory, monkeypatch
) -> None:
    file = folder / "results" / "dmd2_1_seed0.json"
    content = json.loads(file.read_text())
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    content["rows"][0]["previews"] = ["a.png", "gone.png"]
    file.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    found = write(folder)
    assert found.students[0].previews == [str(folder / "a.png")]
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.full
def test_a_cell_of_fewer_seeds_says_so_and_absent_methods_are_rows(folder) -> None:
    more = json.loads((folder / "results" / "dmd2_1_seed0.json").read_text())
    more["rows"][0]["label"] = "pcm"
    (folder / "results" / "pcm_1_seed0.json").write_text(json.dumps(more))
    plan = {"left_out": {"vsd": "is asked for 1 step alone", "pcm": "by an earlier call"}}
    (folder / "comparison.json").write_text(json.dumps(plan))
    write(folder)
    told = (folder / "table.md").read_text()
    assert "| pcm | 2.00 (0.85), 1 of 2 seeds |" in told
    assert "| vsd: left out | is asked for 1 step alone |" in told
    assert "pcm: left out" not in told
    assert "Left out" in (folder / "report.html").read_text()


def test_a_table_of_failures_alone_is_a_table(folder) -> None:
    for file in (folder / "results").iterdir():
        file.unlink()
    write(folder)
    lines = (folder / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}


@pytest.mark.parametrize("flags", [["--budget", "12"], ["--budget", "12s", "--teacher", "me/x"]])
def test_a_mistake_beside_a_teacher_is_told_without_torch(flags: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from stepdistill.cli import main
try:
    main(["compare", "--output_dir", {str(tmp_path)!r}, *{flags!r}])
except SystemExit as stop:
    print(str(stop.code).count("\\n"), sorted({{"torch", "diffusers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0 []"]
