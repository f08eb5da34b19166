"""What README says is so: its code runs, its tables are the package's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import teacher_dir

from stepdistill.methods import METHODS
from stepdistill.models.registry import FAMILIES, family_class
from stepdistill.trainers import TRAINER_OF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_quick_start_is_two_commands() -> None:
    assert '    pip install -e ".[demo]" && stepdistill demo ' in README
    assert '    pip install -e ".[dev]" && pytest ' in README


def test_python_example_runs(tmp_path, tmp_path_factory, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "teacher").symlink_to(teacher_dir("sd_v", tmp_path_factory))
    exec(compile(code.replace("max_train_steps=300", "max_train_steps=2"), "README", "exec"), {})
    assert (tmp_path / "out" / "pipeline" / "model_index.json").is_file()


def test_method_table_is_the_package_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(\w+)` \| ([^|]+) \|$", README, flags=re.MULTILINE)
    told = {name: (trainer, status.strip()) for name, trainer, status in rows}
    own = {name: (TRAINER_OF[name].__name__, info.status) for name, info in METHODS.items()}
    assert told == own


def test_family_table_is_the_package_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`[^|]*)+) \| [^|]+ \|$", README, flags=re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", classes)) for name, classes in rows}
    assert told == {name: set(family_class(name).pipelines) for name in FAMILIES}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:train|configs)/[\w/]+\.(?:py|yaml)", README)))
)
def test_every_named_file_exists(path) -> None:
    assert (ROOT / path).is_file()


def test_every_room_of_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("## License")[0]
    for name in re.findall(r"^      (\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / "stepdistill" / name).is_dir(), name


@pytest.mark.parametrize(
    "command", [["--help"], ["demo", "--help"], ["train", "--help"], ["list"]], ids=" ".join
)
def test_commands_answer(command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill.cli", *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if command == ["list"]:
        assert all(name in done.stdout for name in METHODS)
    if command == ["train", "--help"]:
        assert "--tuning.student" in done.stdout


def test_check_command_passes_on_a_tiny_pipeline(tmp_path_factory) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "stepdistill.cli",
            "check",
            str(teacher_dir("sd_v", tmp_path_factory)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
