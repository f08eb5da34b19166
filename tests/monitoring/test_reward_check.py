"""A held-out reward that falls while the trained one rises is texts; noise and gains are not."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from support.runs import build_trainer, teacher_dir

from stepdistill import TrainConfig
from stepdistill.config.rewards import RewardConfig
from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.monitoring.reward_check import RewardCheck
from stepdistill.monitoring.watchdog import Watchdog, WatchdogStop

PAIR = [{"kind": "hps", "weight": 1.0}, {"kind": "pick", "weight": 0.0}]


def check(rewards=PAIR, **options) -> RewardCheck:
    config = WatchdogConfig(**{"sign_window": 10, **options})
    return RewardCheck(config, 1, [RewardConfig(**one) for one in rewards])


def said(one: RewardCheck, hps: float, pick: float, lines: int = 100, noise: float = 0.01) -> list:
    """Both go there from 0 in a straight line, with noise about it."""
    generator = torch.Generator().manual_seed(0)
    drawn = (noise * torch.randn(lines, 2, generator=generator)).tolist()
    texts = []
    for i, (a, b) in enumerate(drawn):
        done = i / lines
        values = {"student/reward_hps": hps * done + a, "student/reward_pick": pick * done + b}
        texts += [text] if (text := one.bad(values)) else []
    return texts


def test_one_that_falls_while_the_other_rises_is_told() -> None:
    texts = said(check(), 1.0, -0.5)
    assert len(texts) == 9  # every stretch behind the first
    assert texts[-1].startswith("hps rose from 0.04")
    assert "while pick, kept out of training, fell from -0.02" in texts[-1]


@pytest.mark.parametrize(
    ("hps", "pick"), [(1.0, 1.0), (0.0, 0.0), (-1.0, -0.5), (1.0, 0.0), (0.0, -0.5)]
)
def test_what_rises_or_falls_together_or_not_at_all_is_not(hps: float, pick: float) -> None:
    assert said(check(), hps, pick) == []


def test_a_fall_after_a_rise_is_told_from_the_best() -> None:
    one = check()
    assert said(one, 1.0, 1.0) == []
    values = {"student/reward_hps": 1.5, "student/reward_pick": 0.2}
    texts = [text for _ in range(10) if (text := one.bad(values))]
    assert len(texts) == 1
    assert "hps rose from 0.94" in texts[0]
    assert "fell from 0.94 to 0.2" in texts[0]


def test_noise_is_not_a_fall() -> None:
    assert said(check(), 0.001, -0.001, lines=400, noise=0.1) == []


def test_it_is_silent_where_nothing_is_watched_or_it_is_off() -> None:
    assert said(check(PAIR[:1]), 1.0, -1.0) == []
    assert said(check(reward="off"), 1.0, -1.0) == []


def test_scores_that_are_there_now_and_then_wait_for_enough() -> None:
    one = check()
    rows = [{"student/reward_hps": 0.1 * i, "student/reward_pick": -0.1 * i} for i in range(200)]
    sparse = [row if i % 4 == 0 else {} for i, row in enumerate(rows)]
    assert all(one.bad(row) == "" for row in sparse)  # three of ten lines


def test_a_resumed_run_tells_what_an_uninterrupted_one_does() -> None:
    whole, first = check(), check()
    generator = torch.Generator().manual_seed(1)
    drawn = (0.01 * torch.randn(60, generator=generator)).tolist()
    rows = [{"s/reward_hps": i / 60 + x, "s/reward_pick": x - i / 90} for i, x in enumerate(drawn)]
    expected = [whole.bad(row) for row in rows]
    texts = [first.bad(row) for row in rows[:33]]
    again = check()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert texts + [again.bad(row) for row in rows[33:]] == expected
    assert any(expected)
    check().load_state_dict(None)  # of a run begun before


@pytest.mark.parametrize("action", ["warn", "back_off", "stop"])
def test_the_watchdog_acts(action, tmp_path) -> None:
    args = TrainConfig(
        output_dir=str(tmp_path), logging_steps=1, rewards=PAIR,
        watchdog={"reward": action, "sign_window": 5},
    )  # fmt: skip
    dog = Watchdog(args, Accelerator(cpu=True))

    def run() -> None:
        for i in range(10):
            score = {"student/reward_hps": float(i >= 5), "student/reward_pick": -float(i >= 5)}
            dog.check_signs(i, score, 0.0)

    if action == "stop":
        with pytest.raises(WatchdogStop, match=r"hps rose .* \(watchdog.reward\)"):
            run()
    else:
        run()
    (alarm,) = dog.alarms
    assert (alarm.check, alarm.role, alarm.action) == ("reward", "student", action)
    assert ("learning rate of student now" in alarm.message) == (action == "back_off")


@pytest.mark.full
def test_a_run_that_pleases_one_judge_alone_says_so(tmp_path, tmp_path_factory) -> None:
    """The held-out one is the very opposite of the trained one."""
    teacher = teacher_dir("sd3", tmp_path_factory)
    trainer = build_trainer(
        "feedback_last", teacher, "full", tmp_path, max_train_steps=10, learning_rate=1e-2,
        watchdog={"sign_window": 5}, reward_crop=None, train_batch_size=8,
        method_options={"anchor": 0.0},
    )  # fmt: skip
    trainer.train()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    alarms = [event for event in events if event.get("check") == "reward"]
    scores = [
        json.loads(line)["student/reward_brightness"]
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert alarms, scores
    assert "darkness, kept out of training, fell" in alarms[0]["message"]
