"""Commands that write folders, called as a user does: no file that the user put there goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import build_trainer, teacher_dir

from stepdistill.cli import main
from stepdistill.storage.folders import LEDGER

FORMATS = {"lora": ["--format", "lora"], "pipeline": []}
NOTE = "years of work"
TEACHER = {"key": "another", "config": {}, "record": {}}
RECORD = {"num_inference_steps": 1, "load_without": [], "conditioning": "prompt", "call": {}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    teacher = teacher_dir("sd3", tmp_path_factory)
    build_trainer("vsd", teacher, "lora", folder, max_train_steps=1).train()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def user_puts(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(NOTE)


def refused(*command: object) -> str:
    with pytest.raises(SystemExit, match=r"^error: ") as ended:
        main([str(part) for part in command])
    return str(ended.value)


def likely(folder: Path) -> list[Path]:
    """Where others keep what is not whole yet, or was before."""
    names = (f"{folder.name}{end}" for end in (".tmp", ".old", ".bak", ".lock"))
    return [folder.parent / name / "thesis.txt" for name in names]


@pytest.mark.full
@pytest.mark.parametrize("kind", FORMATS)
def test_export(run, tmp_path, kind) -> None:
    mine = tmp_path / "mine"
    command = ("export", str(run), str(mine), *FORMATS[kind])
    user_puts(*likely(mine))
    for _ in range(2):
        main([*command])
    assert {file.read_text() for file in likely(mine)} == {NOTE}
    user_puts(mine / "scheduler" / "note.txt")
    before = contents(tmp_path)
    assert f"got {mine} with scheduler/note.txt. Move it, or" in refused(*command)
    assert contents(tmp_path) == before


@pytest.mark.full
def test_an_export_of_an_earlier_version(run, tmp_path) -> None:
    """It has no list of its files, and a card that the user may have edited."""
    mine = tmp_path / "mine"
    command = ("export", str(run), str(mine), "--format", "lora")
    main([*command])
    (mine / LEDGER).unlink()
    user_puts(mine / "README.md")
    before = contents(mine)
    with pytest.warns(UserWarning, match=r"what was there is now .*mine\.aside"):
        main([*command])
    assert contents(tmp_path / "mine.aside") == before
    assert (mine / LEDGER).is_file()
    (mine / LEDGER).unlink()
    user_puts(mine / "note.txt")
    assert "note.txt" in refused(*command)


@pytest.mark.full
def test_merge(run, tmp_path) -> None:
    one, out = tmp_path / "one", tmp_path / "out"
    main(["export", str(run), str(one), "--format", "lora"])
    command = ("merge", f"{one}:0.5", f"{one}:0.5", "--output", str(out))
    user_puts(*likely(out))
    for _ in range(2):
        main([*command])
    assert {file.read_text() for file in likely(out)} == {NOTE}
    user_puts(out / "note.txt")
    before = contents(tmp_path)
    assert "note.txt. Move it, or choose another folder." in refused(*command)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["0001.png", "metadata.jsonl"])
def test_sample(tmp_path, name) -> None:
    user_puts(tmp_path / "samples" / name)
    (tmp_path / "distillation.json").write_text(json.dumps(RECORD))
    told = refused("sample", tmp_path, "--prompt", "a", "b", "--output_dir", tmp_path / "samples")
    assert f"output_dir: expected a folder without {name}, got " in told
    assert (tmp_path / "samples" / name).read_text() == NOTE


@pytest.mark.parametrize(
    "name",
    ["report.html", "data/labels.csv", "dmd2_full_1step/note.txt", "dmd2_full_4step/pipeline/a.md",
     "dmd2_full_1step/checkpoint-5/note.txt", "teacher/note.txt"],
)  # fmt: skip
@pytest.mark.parametrize("data", ["digits", "emoji"])
def test_demo(tmp_path, name, data) -> None:
    user_puts(tmp_path / name)
    if name.startswith("teacher"):
        (tmp_path / "teacher" / "demo_teacher.json").write_text(json.dumps(TEACHER))
        (tmp_path / "teacher" / "made.json").write_text("{}")
    before = contents(tmp_path)
    named = "data" if name.startswith("data") else Path(name).name
    assert named in refused("demo", "--data", data, "--output_dir", tmp_path)
    assert contents(tmp_path) == before
