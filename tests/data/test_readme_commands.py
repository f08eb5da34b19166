"""Every command of the page on data runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.pages import commands, page
from support.runs import teacher_dir
from support.samples import parquet_folder, tar_folder

from stepdistill.cli import main

COMMANDS = [command.split(" ", 1)[1] for command in commands(page("stepdistill/data/README.md"))]
SMALL = "--resolution 32 --max_train_steps 1 --tuning.rank 2 --disable_progress_bar"


def test_there_are_commands() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["cache", "train", "train", "train"]


@pytest.mark.sampled("prompts.txt --cache_dir cache0")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: " ".join(text.split()[-3:]))
def test_command_runs(command, tmp_path, tmp_path_factory, monkeypatch) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory).resolve()
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(teacher)
    Path("prompts.txt").write_text("a cat\na dog\n")
    tar_folder(Path("shards"))
    parquet_folder(Path("images"))
    main([*shlex.split(command), *SMALL.split()])
    if command.startswith("train"):
        assert Path("runs/default/pipeline/model_index.json").is_file()
    if "--cache_dir" in command:
        assert list(Path("cache").glob("prompts-*/shard-*.safetensors"))
