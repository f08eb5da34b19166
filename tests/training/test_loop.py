"""The loop's own promises: optimiser groups, clipping, rates, accumulation, precision, data."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig
from stepdistill.data.stream import PromptDataset, StreamSampler, stream
from stepdistill.training.optim import lr_factor


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


def test_one_group_per_role_with_its_own_rate(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, role_learning_rates={"fake": 5e-3})
    rates = {g["role"]: g["lr"] for g in trainer.optimizer.param_groups}
    assert rates == {"student": 1e-3, "fake": 5e-3}


def test_a_method_scales_the_rate_of_one_role(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, logging_steps=1)
    trainer.method.learning_rate_scale = lambda step, _, role: (
        6.0 if (role, step) == ("student", 0) else 1.0
    )
    trainer.train()
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    rates = [(line["lr/student"], line["lr/fake"]) for line in lines if "lr/fake" in line]
    assert rates == [(6e-3, 1e-3), (1e-3, 1e-3)]


def test_gradients_are_clipped_per_role(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, role_max_grad_norm={"fake": 1e-9})
    before = fingerprint(trainer.bank.members("fake"))
    optimizer = trainer.optimizer
    norms: list[float] = []
    step = optimizer.step

    def recording() -> None:
        grads = [p.grad for p in trainer.bank.members("fake").values() if p.grad is not None]
        if grads:
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        step()

    optimizer.step = recording
    trainer.train()
    assert norms
    assert max(norms) <= 1.001e-9
    assert fingerprint(trainer.bank.members("fake")) != before


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("constant", [1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1]),
        ("linear", [0.5, 1, 0.5]),
        ("cosine", [0.5, 1, 0.5]),
    ],
)
def test_learning_rate_laws(law, expected) -> None:
    args = TrainConfig(lr_scheduler=law, lr_warmup_steps=2, max_train_steps=12)
    assert [lr_factor(args, step) for step in (0, 2, 7)] == pytest.approx(expected)


@pytest.fixture
def other_precision():
    """Accelerate allows one precision a process; let this test have its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_bf16_trains_float32_weights(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, mixed_precision="bf16")
    base = next(p for n, p in trainer.family.net.named_parameters() if ".lora_" not in n)
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.bank.members("student").values()} == {torch.float32}
    before = fingerprint(trainer.bank.members("student"))
    logs = trainer.train()
    assert all(torch.isfinite(torch.tensor(v)) for v in logs.values())
    moved = fingerprint(trainer.bank.members("student"))
    assert sum(moved[n] != before[n] for n in before) == len(before)


@pytest.mark.full
def test_log_has_a_line_per_step_and_repeats_on_resume(teacher, tmp_path) -> None:
    build_trainer(
        "dmd2", teacher, "lora", tmp_path, max_train_steps=4, checkpointing_steps=2
    ).train()
    whole = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    again = build_trainer(
        "dmd2",
        teacher,
        "lora",
        tmp_path,
        max_train_steps=4,
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
    )
    again.train()
    resumed = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    clock = {"seconds", "steps_per_second"}
    strip = [
        [{k: v for k, v in row.items() if k not in clock} for row in x] for x in (whole, resumed)
    ]
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert strip[0] == strip[1]


def test_time_budget_stops_at_a_step_boundary(teacher, tmp_path) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path, max_train_steps=10**6, max_train_seconds=0.5
    )
    trainer.train()
    assert 0 < trainer.step < 10**6
    assert (tmp_path / f"checkpoint-{trainer.step}").is_dir()


@pytest.mark.full
def test_validation_grid_repeats_with_the_same_weights(teacher, tmp_path) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path, validation_prompts=["a", "b"], validation_steps=2
    )
    trainer.train()
    grid = tmp_path / "validation" / "step-2.png"
    first = grid.read_bytes()
    trainer.validate()
    assert grid.read_bytes() == first


def test_stream_covers_each_epoch_and_starts_anywhere() -> None:
    rows = iter(StreamSampler(size=6, batch=2, seed=1))
    epoch = [next(rows) for _ in range(3)]
    assert sorted(i for batch in epoch for i in batch) == list(range(6))
    later = iter(StreamSampler(size=6, batch=2, seed=1, start=2))
    assert next(later) == epoch[2]


def test_ranks_split_the_global_batch() -> None:
    whole = iter(StreamSampler(size=12, batch=4, seed=1))
    parts = [iter(StreamSampler(12, 2, 1, rank, 2)) for rank in (0, 1)]
    for _ in range(5):
        assert next(whole) == [*next(parts[0]), *next(parts[1])]


def test_workers_do_not_change_the_stream() -> None:
    data = PromptDataset([f"p{i}" for i in range(5)])
    plain, worked = stream(data, 2, 0), stream(data, 2, 0, num_workers=2)
    assert [next(plain) for _ in range(6)] == [next(worked) for _ in range(6)]


@pytest.mark.sampled("full")
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_student_starts_from_another_run(layout, teacher, tmp_path) -> None:
    first = build_trainer("dmd2", teacher, layout, tmp_path / "first", ema_decay=0.5)
    first.train()
    second = build_trainer(
        "dmd2",
        teacher,
        layout,
        tmp_path / "second",
        ema_decay=0.5,
        init_student_from=str(tmp_path / "first"),
    )
    averaged = fingerprint(first.bank.members("ema"))
    assert averaged != fingerprint(first.bank.members("student"))
    for role in ("student", "ema"):
        assert fingerprint(second.bank.members(role)) == averaged
    assert fingerprint(second.bank.members("fake")) != averaged


def test_student_source_without_a_checkpoint_is_refused(teacher, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"init_student_from.*no whole checkpoint"):
        build_trainer(
            "dmd2", teacher, "lora", tmp_path / "run", init_student_from=str(tmp_path / "nowhere")
        )


@pytest.mark.full
def test_trackers_get_the_same_values(teacher, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, report_to=["tensorboard"])
    logs = trainer.train()
    events = EventAccumulator(str(tmp_path / "stepdistill"))
    events.Reload()
    told = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert told["loss/student"] == pytest.approx(logs["loss/student"], rel=1e-6)
    assert set(logs) <= set(told)
