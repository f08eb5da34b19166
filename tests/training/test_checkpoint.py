"""Checkpoints are whole or absent, and the newest whole one is found."""

from __future__ import annotations

import pytest
import torch

from stepdistill.training.checkpoint import (
    fault_of,
    list_checkpoints,
    newest_valid,
    prune,
    write_folder,
)


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
    assert not list(run.glob("*.tmp"))


def test_newest_whole_one_is_taken(run) -> None:
    assert newest_valid(run) == (run / "checkpoint-10", [])


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no manifest"])
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
    else:
        (run / "checkpoint-10" / "manifest.json").unlink()
    found, skipped = newest_valid(run)
    assert found == run / "checkpoint-2"
    assert len(skipped) == 1
    assert skipped[0].startswith("skipped checkpoint-10: ")


def test_a_folder_still_being_written_is_no_checkpoint(run) -> None:
    (run / "checkpoint-11.tmp").mkdir()
    assert newest_valid(run)[0] == run / "checkpoint-10"


def test_prune_keeps_the_newest(run) -> None:
    prune(run, 2)
    assert [p.name for p in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-10"]
    assert fault_of(run / "checkpoint-10") is None
