"""A run cut off or killed anywhere and resumed is the uninterrupted one, to the last bit.

tests/benchmarks/resume.py does the same for every method and family.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.fp16 import in_fp16
from support.killed import killed_differs
from support.resume import cut_off, differences, everything, resumed_differs
from support.runs import build_trainer, teacher_dir
from support.samples import dataset_of

from stepdistill.core.context import DRAW_LAW
from stepdistill.storage.files import read_json
from stepdistill.training.checkpoint import read_state

CASES = ["f_distill", "dmd2_two_sources", "tscd_gan", "progressive", "cd"]
WORKING = {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}


@pytest.mark.full
@pytest.mark.sampled_in_full("dmd2_two_sources-2", "cd-0")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_run_cut_off_anywhere(case, workers, tmp_path, tmp_path_factory) -> None:
    """Ratio bins, segments and heads, stages, an averaged target; data from workers."""
    teacher = teacher_dir("sd", tmp_path_factory)
    options = {**WORKING, "dataloader_num_workers": workers}
    differ, update, total = resumed_differs(case, teacher, "lora", tmp_path, **options)
    assert not differ, f"cut off at update {update} of {total}: {differ[:5]}"


@pytest.mark.full
@pytest.mark.sampled_in_full("dmd2_two_sources", "progressive")
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_instant(case, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    differ, update, total = killed_differs(case, teacher, "lora", tmp_path, **WORKING)
    assert not differ, f"killed in update {update} of {total}: {differ[:5]}"


@pytest.mark.full
@pytest.mark.sampled_in_full("tars")
@pytest.mark.filterwarnings("ignore:data:UserWarning")
@pytest.mark.parametrize("kind", ["images", "tars", "rows", "stream"])
def test_a_run_killed_within_an_epoch_of_shards(kind, tmp_path, tmp_path_factory) -> None:
    """24 samples, two of them unreadable, 4 an update: killed in the first epoch or the second."""
    teacher, data = teacher_dir("sd_v", tmp_path_factory), dataset_of(kind, tmp_path, bad=(4, 11))
    data.size_px = 16
    options = {**WORKING, "max_train_steps": 9, "dataset": data}
    differ, update, total = killed_differs("lcm", teacher, "lora", tmp_path / "runs", **options)
    assert not differ, f"killed in update {update} of {total}: {differ[:5]}"


def scaled(teacher, folder, **options):
    """A trainer in float16 whose scaler begins too high, and then doubles every two updates."""
    trainer = build_trainer(
        "lcm", teacher, "lora", folder, max_train_steps=8, checkpointing_steps=1, **options
    )
    return in_fp16(trainer, init_scale=2.0**28, growth_interval=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing cuts off, whose scale falls at first and rises then."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    whole, scales = scaled(teacher_dir("sd_v", tmp_path_factory), folder), []
    after = whole.method.after

    def note(bank, step) -> None:
        scales.append(whole.accelerator.scaler.get_scale())
        after(bank, step)

    whole.method.after = note
    whole.train()
    assert scales[0] > scales[1] > scales[2]  # updates that were skipped
    assert max(b / a for a, b in pairwise(scales)) == 2.0
    return whole


@pytest.mark.full
@pytest.mark.parametrize("update", [2, 6])
def test_the_gradient_scaler_goes_on_where_it_was(
    whole, update, tmp_path, tmp_path_factory
) -> None:
    """While it still falls and skips updates, and when it has begun to rise."""
    teacher = teacher_dir("sd_v", tmp_path_factory)
    cut_off(scaled(teacher, tmp_path / "cut"), update)
    again = scaled(teacher, tmp_path / "cut", resume_from_checkpoint="latest")
    again.train()
    assert differences(everything(whole), everything(again)) == []


def test_a_run_begun_by_the_law_of_draws_before_goes_on_by_it(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """Its checkpoints name none; it is told so in run.json, as it now is."""
    teacher, folder = teacher_dir("dit", tmp_path_factory), tmp_path / "run"
    whole = build_trainer("lcm", teacher, "lora", folder, checkpointing_steps=1)
    assert whole.facts["draw_law"] == DRAW_LAW
    whole.facts["draw_law"] = 1
    whole.train()

    def as_it_was(path):
        state = read_state(path)
        del state["facts"]["draw_law"]
        return state

    monkeypatch.setattr("stepdistill.training.snapshots.read_state", as_it_was)
    first = str(folder / "checkpoint-1")
    again = build_trainer("lcm", teacher, "lora", folder, resume_from_checkpoint=first)
    again.train()
    assert read_json(folder / "run.json")["draw_law"] == 1
    for name, param in whole.bank.members("student").items():
        assert torch.equal(param, again.bank.members("student")[name])
