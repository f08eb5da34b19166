"""The watchdog's checks one by one, and on runs made to collapse."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.runs import METHOD_CASES, build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig, cli
from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.core.types import Losses
from stepdistill.loading.safe_files import read_tensors
from stepdistill.monitoring.sample_checks import SampleChecks
from stepdistill.monitoring.watchdog import Watchdog, WatchdogStop
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.storage.folders import write_folder


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


def watchdog(folder="nowhere", scaler=None, **options) -> Watchdog:
    accelerator = SimpleNamespace(scaler=scaler, num_processes=1, device=torch.device("cpu"))
    args = TrainConfig(output_dir=str(folder), watchdog=options)
    return Watchdog(args, accelerator)  # type: ignore[arg-type]


def feed(dog: Watchdog, norms, first: int = 0, role: str = "fake") -> None:
    for step, norm in enumerate(norms, first):
        dog.allows({role: torch.tensor(float(norm))}, step)


# --------------------------------------------------------------- gradient norm
def test_a_spike_is_told_with_role_step_and_ratio() -> None:
    dog = watchdog()
    feed(dog, [1.0, 3.0, 2.0] * 10)
    feed(dog, [50.0], first=30)
    dog.check_updates(31)
    (alarm,) = dog.take_alarms()
    assert (alarm["check"], alarm["role"], alarm["step"]) == ("grad_norm", "fake", 30)
    assert alarm["message"] == "gradient norm 50 is 25 times its running median"


def test_norms_within_the_ratio_and_a_young_run_are_quiet() -> None:
    dog = watchdog()
    feed(dog, [1.0] * 5 + [500.0] + [1.0] * 30 + [19.0])
    dog.check_updates(40)
    assert dog.take_alarms() == []


def test_one_telling_until_the_cooldown_is_over() -> None:
    dog = watchdog(cooldown_steps=100)
    feed(dog, [1.0] * 30)
    for step in (30, 60, 130):
        feed(dog, [99.0], first=step)
        dog.check_updates(step + 1)
    assert [alarm["step"] for alarm in dog.take_alarms()] == [30, 130]


def rates(dog: Watchdog) -> dict[str, float]:
    groups = [{"role": "student", "lr": 1.0}, {"role": "fake", "lr": 1.0}]
    dog.scale_rates(SimpleNamespace(param_groups=groups))  # type: ignore[arg-type]
    return {g["role"]: g["lr"] for g in groups}


def test_backing_off_halves_the_roles_rate_and_raises_it_again() -> None:
    dog = watchdog(grad_norm="back_off", cooldown_steps=10)
    feed(dog, [1.0] * 30)
    feed(dog, [99.0], first=30)
    dog.check_updates(31)
    assert rates(dog) == {"student": 1.0, "fake": 0.5}
    dog.check_updates(40)
    assert rates(dog)["fake"] == 0.5
    dog.check_updates(41)
    assert rates(dog)["fake"] == 1.0


def test_backing_off_ends_at_a_floor() -> None:
    dog = watchdog(grad_norm="back_off")
    feed(dog, [1.0] * 100)
    for step in range(100, 120):
        feed(dog, [99.0], first=step)
        dog.check_updates(step + 1)
    assert rates(dog)["fake"] == 0.5**5


def test_stopping_names_role_step_and_the_last_good_checkpoint(tmp_path) -> None:
    write_folder(tmp_path / "checkpoint-20", {}, {"s": {"n": 1}})
    dog = watchdog(tmp_path, grad_norm="stop")
    feed(dog, [1.0] * 30)
    feed(dog, [99.0], first=30)
    with pytest.raises(WatchdogStop, match=r"fake: gradient norm 99 .* at step 30 .*checkpoint-20"):
        dog.check_updates(31)


def test_watching_an_update_reads_nothing_from_the_device() -> None:
    """A meta tensor has no value to wait for."""
    dog = watchdog(grad_norm="stop")
    norm = torch.empty((), device="meta")
    assert dog.allows({"student": norm}, 0)
    dog.see_loss("student", 0, norm)


# ------------------------------------------------------------------ non-finite
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_stops_by_role_and_step(value) -> None:
    dog = watchdog()
    feed(dog, [1.0, value, 1.0], first=7, role="student")
    with pytest.raises(WatchdogStop, match=r"student: expected a finite gradient.*step 8"):
        dog.check_finite()


def test_backing_off_skips_the_update_and_lowers_the_rate() -> None:
    dog = watchdog(nonfinite="back_off")
    assert not dog.allows({"fake": torch.tensor(math.nan), "disc": torch.tensor(1.0)}, 3)
    assert dog.allows({"fake": torch.tensor(1.0), "disc": torch.tensor(1.0)}, 4)
    assert rates(dog)["fake"] == 0.5
    dog.check_updates(5)


def test_a_role_that_never_gets_finite_again_stops() -> None:
    dog = watchdog(nonfinite="back_off", max_skipped_updates=3)
    with pytest.raises(WatchdogStop, match="3 non-finite gradients in a row up to step 2"):
        feed(dog, [math.nan] * 3)


def test_overflow_of_a_gradient_is_the_grad_scalers_affair() -> None:
    dog = watchdog(scaler=object())
    feed(dog, [1.0] * 30 + [math.inf] + [1.0])
    dog.check_updates(32)
    assert dog.take_alarms() == []


# --------------------------------------------------------------------- samples
def verdicts(*metrics: dict[str, float], **options) -> list[set[str]]:
    checks = SampleChecks(WatchdogConfig(**options))
    return [set(checks.bad(step, one)) for step, one in enumerate(metrics)]


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ({"x0_mean_drift": 0.1}, {"x0_mean_drift": 0.8}, "drift"),
        ({"x0_std_ratio": 1.0}, {"x0_std_ratio": 2.1}, "drift"),
        ({"x0_std_ratio": 1.0}, {"x0_std_ratio": 0.45}, "drift"),
        ({"saturation_excess": -0.1}, {"saturation_excess": 0.3}, "drift"),
        ({"diversity_ratio": 0.9}, {"diversity_ratio": 0.2}, "diversity"),
        ({"diversity": 2.0}, {"diversity": 0.5}, "diversity"),
        ({"movement_ratio": 0.9}, {"movement_ratio": 0.3}, "movement"),
    ],
)
def test_what_gets_worse_beyond_its_threshold_is_bad(before, after, check) -> None:
    assert verdicts(before, after) == [set(), {check}]


def test_what_was_never_better_is_on_its_way() -> None:
    """One step from noise begins as a blur: too little spread and diversity, and rising."""
    rising = [{"x0_std_ratio": r, "diversity_ratio": r} for r in (0.1, 0.15, 0.25, 0.6, 0.9)]
    assert verdicts(*rising) == [set()] * 5


def test_a_student_that_draws_one_image_a_prompt_from_the_start_is_bad_in_time() -> None:
    """It never was better: no drift, and no way either once a quarter of the run is over."""
    checks = SampleChecks(WatchdogConfig())
    same = {"diversity_ratio": 0.1}
    assert [set(checks.bad(step, same, step / 8)) for step in range(4)] == [
        set(), set(), {"diversity"}, {"diversity"},
    ]  # fmt: skip
    on_its_way = SampleChecks(WatchdogConfig())
    rising = [{"diversity_ratio": r} for r in (0.1, 0.14, 0.17, 0.25)]
    assert not any(on_its_way.bad(i, one, i / 8) for i, one in enumerate(rising))


def test_a_clip_that_stands_still_from_the_start_is_bad_in_time() -> None:
    checks = SampleChecks(WatchdogConfig())
    still = [checks.bad(step, {"movement_ratio": 0.05}, step / 8) for step in range(3)]
    assert still[:2] == [{}, {}]
    assert still[2] == {"movement": "its videos move 0.05 times as much as the teacher's"}
    assert verdicts(*[{"movement_ratio": 0.05}] * 9, movement="off") == [set()] * 9


def test_a_blur_that_turns_into_saturation_is_bad() -> None:
    assert verdicts({"x0_std_ratio": 0.2}, {"x0_std_ratio": 3.0}) == [set(), {"drift"}]


def test_a_lag_counts_beyond_two_standard_errors() -> None:
    sure = {"fake_lag": -0.9, "fake_lag_error": 0.1}
    unsure = {"fake_lag": -0.9, "fake_lag_error": 0.3}
    assert verdicts(sure, unsure, sure) == [set(), set(), {"fake_lag"}]


def test_patience_counts_validations_in_a_row() -> None:
    dog = watchdog(drift="warn")
    for step, shift in enumerate((0.0, 1.0, 0.1, 1.0, 1.0)):
        dog.check_samples(step, {"x0_mean_drift": shift})
    assert [alarm["step"] for alarm in dog.take_alarms()] == [4]
    assert dog.healthy_step == 2


def test_a_lagging_fake_slows_the_student() -> None:
    dog = watchdog(fake_lag="back_off", patience=1)
    dog.check_samples(10, {"fake_lag": -1.2})
    assert rates(dog) == {"student": 0.5, "fake": 1.0}


def test_a_teacher_guided_out_of_range_is_told_at_once() -> None:
    dog = watchdog(drift="back_off")
    dog.check_samples(0, {"guided_saturation_excess": 0.27, "guided_std_ratio": 1.9})
    (alarm,) = dog.take_alarms()
    assert (alarm["role"], alarm["action"]) == ("teacher", "warn")
    assert "excess saturation 0.27" in alarm["message"]
    assert (rates(dog)["student"], dog.healthy_step) == (1.0, 0)


def test_the_last_good_checkpoint_is_from_before_the_samples_went_bad(tmp_path) -> None:
    for step in (10, 20, 30):
        write_folder(tmp_path / f"checkpoint-{step}", {}, {"s": {"n": 1}})
    dog = watchdog(tmp_path, drift="stop")
    for step, shift in ((10, 0.1), (20, 0.1)):
        dog.check_samples(step, {"x0_mean_drift": shift})
    dog.check_samples(25, {"x0_mean_drift": 2.0})
    assert dog.protected() == ("checkpoint-20",)
    with pytest.raises(WatchdogStop, match=r"mean shift 2 at step 30 .*checkpoint-20"):
        dog.check_samples(30, {"x0_mean_drift": 2.0})


def test_state_goes_through_json_exactly() -> None:
    """A watchdog saved in the middle tells what one that was never saved tells."""
    norms = [1.0 + 0.1 * (i % 7) for i in range(50)] + [99.0, 1 / 3, 77.7]
    told = []
    for cut in (None, 37):
        dog = watchdog(grad_norm="back_off", cooldown_steps=5)
        for step, norm in enumerate(norms):
            if step == cut:
                state = json.loads(json.dumps(dog.state_dict()))
                dog = watchdog(grad_norm="back_off", cooldown_steps=5)
                dog.load_state_dict(state)
            feed(dog, [norm], first=step)
            if step % 4 == 3:
                dog.check_updates(step + 1)
        told.append((dog.take_alarms(), dog.state_dict()))
    assert told[0] == told[1]
    assert len(told[0][0]) == 1  # 99 alone has been looked at; 77.7 is still pending


# -------------------------------------------------------------- on real runs
def lines(folder, name: str) -> list[dict]:
    clock = {"seconds", "steps_per_second"}
    rows = [json.loads(x) for x in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


@pytest.mark.full
def test_a_run_that_backs_off_resumes_exactly(teacher, tmp_path) -> None:
    """Checkpoints fall between log lines, and the rates are lowered before and after."""
    options = {
        "max_train_steps": 20, "logging_steps": 4, "checkpointing_steps": 13,
        "validation_prompts": ["a"], "num_validation_images": 2, "validation_steps": 6,
        "validation_teacher_steps": 2,
        "watchdog": {"grad_norm": "back_off", "grad_norm_ratio": 1.01, "fake_lag": "back_off",
                     "max_fake_lag": 1e-6, "patience": 1, "cooldown_steps": 3},
    }  # fmt: skip
    whole = build_trainer("dmd2", teacher, "lora", tmp_path, **options)
    whole.train()
    names = ("log.jsonl", "events.jsonl", "validation.jsonl")
    before = [lines(tmp_path, name) for name in names]
    alarms = [event["step"] for event in before[1] if event["kind"] == "alarm"]
    assert min(alarms) < 13 < max(alarms)
    assert min(row["lr/fake"] for row in before[0]) < 1e-3
    again = build_trainer(
        "dmd2", teacher, "lora", tmp_path,
        **{**options, "resume_from_checkpoint": str(tmp_path / "checkpoint-13")},
    )  # fmt: skip
    again.train()
    assert [lines(tmp_path, name) for name in names] == before
    for role in ("student", "fake"):
        assert fingerprint(again.bank.members(role)) == fingerprint(whole.bank.members(role))


def test_an_exploding_rate_stops_and_spoils_no_checkpoint(teacher, tmp_path, monkeypatch) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path, max_train_steps=9, checkpointing_steps=1, logging_steps=9
    )
    monkeypatch.setattr(
        trainer.method, "learning_rate_scale", lambda step, *_: 1.0 if step < 3 else 1e36
    )
    with pytest.raises(WatchdogStop, match=r"finite .* at step 3\. Last good .*checkpoint-3\. "):
        trainer.train()
    assert trainer.step == 4
    good, skipped = newest_valid(tmp_path)
    assert (good, skipped) == (tmp_path / "checkpoint-3", [])
    saved = read_tensors(good / "role_student.safetensors")
    assert all(bool((value.abs() < 10).all()) for value in saved.values())
    (end,) = [e for e in lines(tmp_path, "events.jsonl") if e["kind"] == "end"]
    assert end["state"] == "stopped by the watchdog"
    assert "stopped by the watchdog" in (tmp_path / "report.html").read_text()


def poison(trainer, step: int, monkeypatch) -> None:
    """Make the last phase's loss NaN at that step."""
    real = trainer.method.phases

    def phases(at: int):
        found = list(real(at))
        if at == step:
            loss = found[-1].loss

            def broken(nets, batch, ctx):
                out = loss(nets, batch, ctx)
                return Losses(out.total * torch.nan, out.logs)

            found[-1] = type(found[-1])(found[-1].name, broken, found[-1].trains)
        return found

    monkeypatch.setattr(trainer.method, "phases", phases)


@pytest.mark.full
def test_backing_off_goes_on_past_a_nan(teacher, tmp_path, monkeypatch) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path, max_train_steps=4, watchdog={"nonfinite": "back_off"}
    )
    poison(trainer, 1, monkeypatch)
    trainer.train()
    assert trainer.step == 4
    assert all(bool(p.isfinite().all()) for p in trainer.bank.members("fake").values())
    rows = lines(tmp_path, "log.jsonl")
    assert [row["lr/fake"] for row in rows] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert ["loss/fake" in row for row in rows] == [True, False, True, True]
    assert [e["message"].split(";")[0] for e in lines(tmp_path, "events.jsonl")[:1]] == [
        "skipped a non-finite gradient"
    ]


@pytest.mark.full
def test_guidance_50_is_stopped_as_drift(teacher, tmp_path, monkeypatch) -> None:
    spec = METHOD_CASES["dmd2"]
    strong = {"num_steps": 1, "critic_steps": 1, "guidance": 50.0}
    monkeypatch.setitem(METHOD_CASES, "dmd2", replace(spec, options=strong))
    trainer = build_trainer(
        "dmd2", teacher, "full", tmp_path, max_train_steps=40, learning_rate=2e-2,
        validation_prompts=["a"], num_validation_images=2, validation_steps=2,
        validation_teacher_steps=2, validation_guidance=1.0, checkpointing_steps=2,
        watchdog={"drift": "stop"},
    )  # fmt: skip
    with pytest.raises(WatchdogStop, match=r"drifts from the teacher's: .*watchdog\.drift"):
        trainer.train()
    assert trainer.step < 40
    assert not (tmp_path / f"checkpoint-{trainer.step}").exists()


@pytest.mark.full
def test_a_healthy_run_raises_nothing(tmp_path, tmp_path_factory) -> None:
    build_trainer(
        "dmd2", teacher_dir("sd_v", tmp_path_factory), "lora", tmp_path,
        max_train_steps=6, learning_rate=1e-4, validation_prompts=["a"],
        num_validation_images=2, validation_steps=2,
        validation_teacher_steps=2,
    ).train()  # fmt: skip
    assert [event["kind"] for event in lines(tmp_path, "events.jsonl")] == ["end"]


@pytest.mark.full
def test_a_stopped_process_leaves_with_status_76(teacher, tmp_path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(SystemExit) as left:
        cli.main(
            ["train", "--pretrained_model_name_or_path", str(teacher), "--method", "dmd2",
             "--data.prompts_file", str(tmp_path / "prompts.txt"), "--output_dir",
             str(tmp_path / "run"), "--learning_rate", "1e18", "--max_grad_norm", "1e30",
             "--max_train_steps", "30", "--logging_steps", "1", "--disable_progress_bar",
             "--method_config.num_steps", "1", "--method_config.critic_steps", "1"]
        )  # fmt: skip
    assert left.value.code == 76
    assert "stopped: " in capsys.readouterr().err


@pytest.mark.full
def test_a_run_out_of_time_is_finished_and_a_preempted_one_is_not(teacher, tmp_path) -> None:
    late = build_trainer("dmd2", teacher, "lora", tmp_path / "late", max_train_seconds=1e-3)
    late.train()
    taken = build_trainer("dmd2", teacher, "lora", tmp_path / "taken", max_train_steps=9)
    after = taken.method.after

    def signalled(bank, step) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        after(bank, step)

    taken.method.after = signalled  # type: ignore[method-assign]
    taken.train()
    ends = [lines(tmp_path / name, "events.jsonl")[-1]["state"] for name in ("late", "taken")]
    assert ends == ["finished", "preempted"]
