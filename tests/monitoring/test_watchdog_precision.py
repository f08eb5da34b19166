"""Runs made to overflow in half precision: told, stopped or skipped as configured, and what the
checkpoint that is named as good is worth.
"""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from support.fp16 import in_fp16
from support.runs import build_trainer, teacher_dir

from stepdistill.loading.safe_files import read_tensors
from stepdistill.monitoring.watchdog import WatchdogStop
from stepdistill.storage.checkpoints import newest_valid


@pytest.fixture
def teacher(tmp_path_factory):
    yield teacher_dir("sd_v", tmp_path_factory)
    AcceleratorState._reset_state()


def trainer_of(teacher, folder, precision: str, case: str = "dmd2", **options):
    """Nine steps of LoRA training, saved at each, with gradients that are not clipped."""
    AcceleratorState._reset_state()  # a process has one precision
    trainer = build_trainer(
        case, teacher, "lora", folder,
        mixed_precision="no" if precision == "fp16" else precision,
        **{"max_train_steps": 7, "checkpointing_steps": 1, "max_grad_norm": 1e30, **options},
    )  # fmt: skip
    return in_fp16(trainer) if precision == "fp16" else trainer


def jump_at(trainer, step: int, factor: float) -> None:
    """Learning rates times `factor` from that step on."""
    trainer.method.learning_rate_scale = lambda at, *_: 1.0 if at < step else factor


def overflows(trainer) -> set[torch.dtype]:
    """Filled while it runs: dtypes of activations that were not finite while all weights were."""
    found: set[torch.dtype] = set()

    def look(_module, _inputs, output) -> None:
        if torch.is_tensor(output) and not bool(output.isfinite().all()):
            own = [p for role in trainer.bank.roles for p in trainer.bank.members(role).values()]
            if all(bool(p.isfinite().all()) for p in own):
                found.add(output.dtype)

    for module in trainer.family.net.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    return found


def events(folder, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def still_works(teacher, folder, good, precision: str, case: str = "dmd2") -> bool:
    """Whether one more update from that checkpoint has a finite loss, at the usual rate."""
    options = {"resume_from_checkpoint": str(good), "max_train_steps": int(good.name[11:]) + 1}
    trainer = trainer_of(teacher, folder, precision, case, **options)
    trainer.train()
    return trainer.step == options["max_train_steps"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [pytest.param("bf16", "bfloat16", marks=pytest.mark.every), ("fp16", "float16")],
)
def test_an_overflow_stops_the_run_and_names_a_checkpoint_that_works(
    teacher, tmp_path, precision, dtype
) -> None:
    """The rate jumps at step 3; all weights stay finite, the activations do not."""
    trainer = trainer_of(teacher, tmp_path, precision)
    jump_at(trainer, 3, 1e5)
    seen = overflows(trainer)
    with pytest.raises(
        WatchdogStop, match=r"finite loss.* at step 3\. Last good .*checkpoint-3\. "
    ):
        trainer.train()
    assert getattr(torch, dtype) in seen
    (end,) = events(tmp_path, "end")
    assert end["state"] == "stopped by the watchdog"
    saved = read_tensors(tmp_path / "checkpoint-3" / "role_student.safetensors")
    assert max(float(value.abs().max()) for value in saved.values()) < 1.0
    assert still_works(teacher, tmp_path, tmp_path / "checkpoint-3", precision)


@pytest.mark.full
def test_float16_overflows_where_bfloat16_does_not(teacher, tmp_path) -> None:
    """The same jump by a thousand: float16 ends at 65504."""
    narrow, wide = (
        trainer_of(teacher, tmp_path / p, p, max_train_steps=5) for p in ("fp16", "bf16")
    )
    for trainer in (narrow, wide):
        jump_at(trainer, 3, 1e3)
    narrow_seen, wide_seen = overflows(narrow), overflows(wide)
    with pytest.raises(WatchdogStop, match="non-finite one at step 3"):
        narrow.train()
    wide.train()
    assert torch.float16 in narrow_seen
    assert not wide_seen


@pytest.mark.full
def test_a_checkpoint_of_ruined_weights_is_not_named(teacher, tmp_path) -> None:
    """What a step's last update ruins is saved before a loss shows it."""
    trainer = trainer_of(teacher, tmp_path, "bf16", "lcm")
    jump_at(trainer, 3, 1e36)
    with pytest.raises(WatchdogStop, match=r"at step 4\. Last good .*checkpoint-3\. "):
        trainer.train()
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-4"  # whole, and worthless
    with pytest.raises(WatchdogStop, match="non-finite"):
        still_works(teacher, tmp_path, tmp_path / "checkpoint-4", "bf16", "lcm")
    assert still_works(teacher, tmp_path, tmp_path / "checkpoint-3", "bf16", "lcm")


@pytest.mark.full
def test_backing_off_from_ruined_weights_ends_and_keeps_the_good_checkpoint(
    teacher, tmp_path
) -> None:
    """Two checkpoints are kept, four are saved of the ruined weights meanwhile."""
    backing = {"watchdog": {"nonfinite": "back_off"}, "checkpoints_total_limit": 2}
    trainer = trainer_of(teacher, tmp_path, "bf16", **backing)
    jump_at(trainer, 3, 1e5)
    with pytest.raises(WatchdogStop, match=r"10 non-finite gradients in a row.*checkpoint-3\. "):
        trainer.train()
    told = [event["message"] for event in events(tmp_path, "alarm")]
    assert len(told) == 10
    assert told[0] == "skipped a non-finite gradient; learning rate of fake now times 0.5"
    assert (tmp_path / "checkpoint-3").is_dir()
    assert trainer.step == 6
    (end,) = events(tmp_path, "end")
    assert end["state"] == "stopped by the watchdog"
    assert still_works(teacher, tmp_path, tmp_path / "checkpoint-3", "bf16")


def bad_batch(trainer, at: int) -> None:
    """Make the latents of the at-th batch too large."""
    latents, seen = trainer.batches._x0, []

    def spoiled(raw):
        x0 = latents(raw)
        seen.append(raw)
        return torch.full_like(x0, 3e38) if len(seen) == at + 1 else x0

    trainer.batches._x0 = spoiled


@pytest.mark.full
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.every), "fp16"])
def test_backing_off_skips_a_batch_that_overflows(teacher, tmp_path, precision) -> None:
    trainer = trainer_of(
        teacher, tmp_path, precision, "lcm",
        max_train_steps=6, watchdog={"nonfinite": "back_off", "cooldown_steps": 100},
    )  # fmt: skip
    bad_batch(trainer, 2)
    seen = overflows(trainer)
    trainer.train()
    assert trainer.step == 6
    assert seen
    (alarm,) = events(tmp_path, "alarm")
    assert (alarm["step"], alarm["role"], alarm["action"]) == (2, "student", "back_off")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["lr/student"] for row in rows] == [1e-3] * 3 + [5e-4] * 3
    assert ["loss/student" in row for row in rows] == [True, True, False, True, True, True]
    for value in trainer.bank.members("student").values():
        assert bool(value.isfinite().all())


@pytest.mark.full
def test_a_batch_that_overflows_stops_a_scaled_run_by_its_loss(teacher, tmp_path) -> None:
    """A scaler would skip it without a word."""
    trainer = trainer_of(teacher, tmp_path, "fp16", "lcm")
    bad_batch(trainer, 2)
    with pytest.raises(WatchdogStop, match=r"student: expected a finite loss.* at step 2"):
        trainer.train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_is_refused_where_accelerate_ignores_it(teacher, tmp_path) -> None:
    AcceleratorState._reset_state()
    with pytest.raises(ValueError, match="expected no or bf16 on cpu, got fp16"):
        build_trainer("lcm", teacher, "lora", tmp_path, mixed_precision="fp16")
