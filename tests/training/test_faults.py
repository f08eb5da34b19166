"""Kills and signals at any instant lose nothing: real processes, see support/faults.py."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from support import attack
from support.faults import findings
from support.processes import LIMIT_S, run
from support.runs import build_trainer, teacher_dir

from stepdistill.storage.checkpoints import list_checkpoints


def told(
    tmp_path_factory: Any, *parts: str, find: Callable[..., Any] = findings, limit_s: int = LIMIT_S
) -> dict[str, Any]:
    """From a process of its own, which none of this one's trainings has changed."""
    out = tmp_path_factory.mktemp("faults")
    teacher = teacher_dir("sd3", tmp_path_factory)

    def work() -> None:
        print(json.dumps(find(teacher, out, *parts)))

    done = run(work, limit_s=limit_s, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def each_operation(tmp_path_factory):
    return told(tmp_path_factory, "operations")["operations"]


@pytest.fixture(scope="module")
def thorough(tmp_path_factory):
    return told(tmp_path_factory, "signal:SIGTERM", "ranks")


@pytest.mark.full
def test_no_operation_of_a_save_can_be_killed_to_lose_a_checkpoint(each_operation) -> None:
    assert each_operation["tries"] > 20
    assert each_operation["lost"] == []


@pytest.mark.full
def test_the_next_save_clears_what_a_kill_left(each_operation) -> None:
    assert each_operation["unrepaired"] == []


@pytest.mark.full
def test_a_run_killed_thrice_loses_nothing_and_ends_the_same(tmp_path_factory) -> None:
    found = told(tmp_path_factory, "kills:3")["kills"]
    assert (found["tries"], found["lost"], found["differ"]) == (3, 0, [])


@pytest.mark.full
def test_a_signal_to_a_run_and_its_data_worker_saves_and_leaves_with_75(thorough) -> None:
    found = thorough["signal:SIGTERM"]
    assert found["status"] == 75
    assert found["step"] >= 1
    assert not found["exported"]


@pytest.mark.full
def test_the_resumed_run_is_the_run_that_was_not_signalled(thorough) -> None:
    found = thorough["signal:SIGTERM"]
    assert found["later"] == [0, 0]
    assert found["differ"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_at_the_step_boundary_and_is_handed_back(
    number, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    trainer = build_trainer("cd", teacher, "lora", tmp_path, max_train_steps=10**6)
    before, update = signal.getsignal(number), trainer._update

    def signalled(*args: Any) -> None:
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        update(*args)

    monkeypatch.setattr(trainer, "_update", signalled)
    trainer.train()
    assert (trainer.step, trainer.stop.preempted) == (2, True)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert signal.getsignal(number) == before


@pytest.mark.every  # two minutes; test_a_kill_at_any_instant has those of other kinds
def test_fifty_kills_lose_nothing(tmp_path_factory) -> None:
    found = told(tmp_path_factory, "kills:50")["kills"]
    assert (found["tries"], found["lost"], found["differ"]) == (50, 0, [])
    assert found["in_save"] > 0


SHARES = {"a quarter": 4, "all": 1}  # of the kills in attack.PLAN, which see


@pytest.fixture(scope="module", params=SHARES)
def attacked(request, tmp_path_factory):
    """(the share, what was found by kind)"""
    share = SHARES[request.param]
    parts = (f"{kind}:{kills // share}" for kind, kills in attack.PLAN.items())
    return share, told(tmp_path_factory, *parts, find=attack.findings, limit_s=3000)


@pytest.mark.full
@pytest.mark.sampled_in_full(attacked=("a quarter",))
@pytest.mark.parametrize(
    ("kind", "kills"),
    [("training", 30), ("saving", 22), ("export", 12), ("cache", 12), ("pairs", 12)],
)
def test_a_kill_at_any_instant_loses_nothing_and_the_next_call_ends_alike(
    attacked, kind, kills
) -> None:
    share, found = attacked[0], attacked[1][kind]
    assert (found["kills"], found["lost"], found["differ"]) == (kills // share, [], [])
    assert found["compared"] >= kills // share


@pytest.mark.every  # a minute; test_a_signal_ends_a_run sends it in this process
def test_sigusr1_does_the_same(tmp_path_factory) -> None:
    found = told(tmp_path_factory, "signal:SIGUSR1")["signal:SIGUSR1"]
    assert (found["status"], found["later"], found["differ"]) == (75, [0, 0], [])


@pytest.mark.full
def test_a_signal_on_one_rank_stops_both(thorough) -> None:
    assert thorough["ranks"]["statuses"] == [75, 75]
    assert thorough["ranks"]["world_size"] == 2


@pytest.mark.full
def test_what_one_rank_does_not_find_is_refused_by_both_soon(tmp_path_factory) -> None:
    found = told(tmp_path_factory, "refused")["refused"]
    assert found["statuses"] == [1, 1]
    assert found["told"][0] == found["told"][1]
    assert found["told"][0].startswith("error: process 1: ")
    assert found["seconds"] < 60


@pytest.mark.full
def test_a_run_whose_launcher_is_killed_saves_and_meets_no_other(tmp_path_factory) -> None:
    found = told(tmp_path_factory, "orphans")["orphans"]
    assert found == {"meets": 1, "state": "preempted", "saved": True}


@pytest.mark.full
@pytest.mark.sampled_in_full("ddp")
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_the_watchdogs_verdict_is_that_of_both_ranks(wrapping, tmp_path_factory) -> None:
    """The first process alone makes the samples that are judged."""
    part = f"stopped:{wrapping}"
    found = told(tmp_path_factory, part)[part]
    healthy, collapsed = found["healthy"], found["collapsed"]
    assert (healthy["statuses"], healthy["checkpoints"]) == ([0, 0], ["checkpoint-2"])
    assert healthy["exported"]
    assert collapsed["statuses"] == [76, 76]
    # The first process alone tells what the run is, too.
    verdicts = {told.partition("\nteacher: ")[0] for told in collapsed["told"]}
    assert len(verdicts) == 1
    assert verdicts.pop().startswith("stopped: student: x0 drifts from the teacher")
    assert (collapsed["checkpoints"], collapsed["exported"]) == ([], False)
