"""`trainer_of_run`: a run exports from its checkpoint, whoever trained it and from what."""

from __future__ import annotations

import json
import shutil

import pytest
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill.storage.folders import write_folder
from stepdistill.trainers import trainer_of_run


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


def test_student_is_the_run_s_and_its_record_stays(teacher, tmp_path) -> None:
    first = build_trainer("dmd2", teacher, "lora", tmp_path / "warm")
    first.train()
    run = tmp_path / "run"
    trained = build_trainer(
        "dmd2", teacher, "lora", run, init_student_from=str(tmp_path / "warm"), ema_decay=0.5
    )
    trained.train()
    record = (run / "run.json").read_bytes()
    shutil.rmtree(tmp_path / "warm")  # the checkpoint is enough
    found = trainer_of_run(run)
    assert found.step == 2
    for role in ("student", "ema"):
        assert fingerprint(found.bank.members(role)) == fingerprint(trained.bank.members(role))
    found.export(tmp_path / "out")
    assert (run / "run.json").read_bytes() == record


@pytest.mark.full
def test_a_run_of_several_processes_exports_on_one(teacher, tmp_path) -> None:
    trained = build_trainer("dmd2", teacher, "lora", tmp_path)
    trained.train()
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    state |= {"world_size": 4, "global_batch": 8}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_folder(tmp_path / "scratch", {}, {"trainer_state": state})  # its size and hash
    own = json.loads((tmp_path / "scratch" / "manifest.json").read_text())
    shutil.copy(tmp_path / "scratch" / "trainer_state.json", folder)
    manifest["trainer_state.json"] = own["trainer_state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = trainer_of_run(tmp_path)
    assert fingerprint(found.bank.members("student")) == fingerprint(
        trained.bank.members("student")
    )


def test_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="run_dir: expected a run"):
        trainer_of_run(tmp_path)
