"""A method of a file of one's own, from the first command to the last, and what is said."""

from __future__ import annotations

import re

import pytest
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.methods import METHODS

SOURCE = '''"""A student that is pulled to the teacher's x0."""

from stepdistill.methods.dmd2 import DMD2


class Pull(DMD2):
    name = "pull_of_a_file"
'''


@pytest.mark.full
def test_a_method_of_a_file_trains_resumes_and_exports(
    tmp_path, tmp_path_factory, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(METHODS, "files", {})
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    teacher, out = teacher_dir("sd", tmp_path_factory), str(tmp_path / "run")
    train = [
        *("train", "--method", f"{tmp_path}/mine.py:Pull", "--max_train_steps", "1"),
        *("--pretrained_model_name_or_path", str(teacher), "--output_dir", out),
        *("--data.prompts_file", str(tmp_path / "prompts.txt"), "--tuning.rank", "2"),
    ]
    main(train)
    said = capfd.readouterr()
    assert "method:  pull_of_a_file (" in said.out
    # Nothing that looks like a failure, and no bar of what is over at once.
    assert not re.search(r"(?i)warning|error|fail|deprecat|traceback", said.err), said.err
    monkeypatch.setattr(METHODS, "files", {})  # another process
    main([*train, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"])
    monkeypatch.setattr(METHODS, "files", {})
    main(["export", out, str(tmp_path / "out")])
    assert (tmp_path / "out" / "model_index.json").is_file()
