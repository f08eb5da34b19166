"""Checkpoints are whole or absent, and the newest whole one is found."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from stepdistill.storage.checkpoints import list_checkpoints, newest_valid
from stepdistill.storage.files import write_text
from stepdistill.storage.folders import aside_of, fault_of, old_of, write_folder
from stepdistill.training.checkpoint import prune, read_state, save_checkpoint, saved_student


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 10):
        write_folder(tmp_path / f"checkpoint-{step}", {"a": {"x": torch.ones(3)}}, {"s": {"n": 1}})
    return tmp_path


def test_order_is_by_number(run) -> None:
    assert [p.name for p in list_checkpoints(run)] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-10",
    ]


def test_no_temporary_folder_stays(run) -> None:
    assert not list(run.glob(".*"))


def test_newest_whole_one_is_taken(run) -> None:
    assert newest_valid(run) == (run / "checkpoint-10", [])


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "missing", "no manifest", "broken manifest", "empty manifest"]
)
def test_damaged_ones_are_skipped_by_name(run, damage) -> None:
    target = run / "checkpoint-10" / "a.safetensors"
    data = bytearray(target.read_bytes())
    if damage == "truncate":
        target.write_bytes(data[:-4])
    elif damage == "flip":
        data[-1] ^= 1
        target.write_bytes(data)
    elif damage == "missing":
        target.unlink()
    elif damage == "no manifest":
        (run / "checkpoint-10" / "manifest.json").unlink()
    else:
        broken = '{"a.saf' if damage == "broken manifest" else "{}"
        (run / "checkpoint-10" / "manifest.json").write_text(broken)
    found, skipped = newest_valid(run)
    assert found == run / "checkpoint-2"
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped checkpoint-10: ")


def test_a_folder_still_being_written_is_no_checkpoint(run) -> None:
    aside_of(run / "checkpoint-11").mkdir()
    assert newest_valid(run)[0] == run / "checkpoint-10"


def test_prune_keeps_the_newest(run) -> None:
    prune(run / "checkpoint-10", 2)
    assert [p.name for p in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-10"]
    assert fault_of(run / "checkpoint-10") is None


def names(run) -> list[str]:
    return sorted(p.name for p in run.iterdir())


def spoil(folder) -> None:
    (folder / "a.safetensors").write_bytes(b"short")


def test_a_damaged_newer_one_pushes_no_good_one_out(run) -> None:
    """The run went on from 2, since 10 is damaged; 10 is neither counted nor deleted."""
    spoil(run / "checkpoint-10")
    write_folder(run / "checkpoint-3", {}, {"s": {"n": 3}})
    prune(run / "checkpoint-3", 2)
    assert names(run) == ["checkpoint-10", "checkpoint-2", "checkpoint-3"]


def test_a_damaged_older_one_does_not_count(run) -> None:
    spoil(run / "checkpoint-2")
    prune(run / "checkpoint-10", 2)
    assert names(run) == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]


def test_one_put_aside_counts_until_its_heir_is_there(run) -> None:
    old = old_of(run / "checkpoint-10")
    (run / "checkpoint-10").rename(old)
    assert newest_valid(run) == (old, [])
    write_folder(run / "checkpoint-10", {}, {"s": {"n": 2}})
    assert names(run) == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]


def test_a_damaged_heir_does_not_cost_the_good_one_put_aside(run) -> None:
    write_folder(run / "kept", {}, {"s": {"n": 0}})
    (run / "kept").rename(old_of(run / "checkpoint-10"))
    spoil(run / "checkpoint-10")
    aside_of(run / "checkpoint-10").write_text("in the way of the folder")
    with pytest.raises(OSError, match="checkpoint-10: expected to write it"):
        write_folder(run / "checkpoint-10", {}, {"s": {"n": 2}})
    assert newest_valid(run)[0] == old_of(run / "checkpoint-10")


@pytest.mark.parametrize("name", ["checkpoint-1.old", "checkpoint-1.tmp", "checkpoint-1/note.txt"])
def test_what_a_user_put_there_is_never_deleted(run, name) -> None:
    """A copy by another name, or a file in a checkpoint that is due to go."""
    if "/" not in name:
        shutil.copytree(run / "checkpoint-1", run / name)
    else:
        (run / name).write_text("mine")
    prune(run / "checkpoint-10", 1)
    write_folder(run / "checkpoint-1", {}, {"s": {"n": 2}})
    prune(run / "checkpoint-10", 1)
    assert (run / name).exists() or (run / "checkpoint-1.aside" / "note.txt").exists()


class NoBank:
    """A bank without roles: what is saved is the method's tensors alone."""

    roles: tuple[str, ...] = ()
    trained_roles: tuple[str, ...] = ()


@pytest.fixture
def full_disk():
    """Files of this process end at 64 KiB, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_full_disk_loses_nothing_and_names_the_last_good_one(run, kind) -> None:
    tensors = {"x": torch.ones(1 << 15)} if kind == "tensors" else {}
    state = {"words": "x" * (1 << 17)} if kind == "json" else {}
    told = r"checkpoint-11: expected to write it.*Newest whole checkpoint: checkpoint-10"
    with pytest.raises(OSError, match=told):
        save_checkpoint(run / "checkpoint-11", NoBank(), None, tensors, state)  # type: ignore[arg-type]
    assert names(run) == ["checkpoint-1", "checkpoint-10", "checkpoint-2"]
    assert newest_valid(run) == (run / "checkpoint-10", [])


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_earlier_text(tmp_path) -> None:
    write_text(tmp_path / "run.json", "{}")
    with pytest.raises(OSError, match="File too large"):
        write_text(tmp_path / "run.json", "x" * (1 << 17))
    assert (tmp_path / "run.json").read_text() == "{}"


@pytest.fixture
def read_only():
    """A folder with one checkpoint that can't be written to, by root either."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "checkpoint-1", {}, {"s": {"n": 1}})
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_read_only_folder_loses_nothing(read_only) -> None:
    with pytest.raises(OSError, match=r"Permission denied.*Newest whole checkpoint: checkpoint-1"):
        save_checkpoint(read_only / "checkpoint-2", NoBank(), None, {}, {})  # type: ignore[arg-type]
    assert newest_valid(read_only) == (read_only / "checkpoint-1", [])


def test_one_that_cannot_be_read_is_skipped(run, monkeypatch) -> None:
    """A disk that fails under one file costs that checkpoint alone."""
    opened = Path.open

    def failing(path, *args, **kwargs):
        if path == run / "checkpoint-10" / "a.safetensors":
            raise OSError(5, "Input/output error")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    found, skipped = newest_valid(run)
    assert found == run / "checkpoint-2"
    assert skipped == ["skipped checkpoint-10: it can't be read ([Errno 5] Input/output error)"]


def test_a_damaged_one_asked_for_by_name_is_refused(run) -> None:
    spoil(run / "checkpoint-10")
    with pytest.raises(ValueError, match=r'5 bytes, expected.*Pass "latest"'):
        read_state(run / "checkpoint-10")


def test_a_start_from_an_earlier_student_says_so(run) -> None:
    write_folder(run / "checkpoint-9", {"role_student": {"x": torch.ones(1)}}, {})
    spoil(run / "checkpoint-10")
    with pytest.warns(UserWarning, match="skipped checkpoint-10: a.safetensors has 5 bytes"):
        assert saved_student(run) == run / "checkpoint-9" / "role_student"
