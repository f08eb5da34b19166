"""Signs of a collapse, from tensors whose spread is known."""

from __future__ import annotations

import pytest
import torch

from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.core.denoiser import Prediction
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Batch, Cond
from stepdistill.monitoring.step_signs import SignChecks, StepSigns

LABELS = torch.tensor([0, 1, 0, 1, 2, 0])


def pred_of(x0: torch.Tensor, x_t: torch.Tensor, grad: bool = False) -> Prediction:
    """A prediction of x0 at t = 1/2 of the flow path."""
    t = torch.full((len(x0),), 0.5, dtype=torch.float64)
    raw = ((x_t - x0) / 0.5).requires_grad_(grad)
    return Prediction(raw, x_t, t, FlowPath(), "flow")


def batch_of(labels: torch.Tensor, x0: torch.Tensor | None = None) -> Batch:
    cond = Cond({"class": labels})
    return Batch(cond, cond, (2, 4, 4), x0)


def logs_of(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor = LABELS):
    signs = StepSigns()
    x_t = torch.randn(len(student), 2, 4, 4)
    signs.see("student", pred_of(student, x_t, grad=True))
    signs.see("teacher", pred_of(teacher, x_t))
    return {k: float(v) for k, v in signs.logs(batch_of(labels)).items()}


def pairs(x: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Half the mean squared distance over ordered pairs, those of another label as 0."""
    count, total = len(x), 0.0
    for i in range(count):
        for j in range(count):
            if labels is None or labels[i] == labels[j]:
                total += 0.5 * float((x[i] - x[j]).square().mean())
    return total / (count * (count - 1))


def test_spreads_are_those_of_all_pairs_and_of_pairs_of_a_condition() -> None:
    student, teacher = torch.randn(6, 2, 4, 4), 3.0 * torch.randn(6, 2, 4, 4)
    found = logs_of(student, teacher)
    assert found["x0_spread"] == pytest.approx(pairs(student, None), rel=1e-4)
    assert found["x0_spread"] == pytest.approx(float(student.var(0).mean()), rel=1e-4)
    assert found["teacher_spread"] == pytest.approx(pairs(teacher, None), rel=1e-4)
    assert found["x0_prompt_spread"] == pytest.approx(pairs(student, LABELS), rel=1e-4)
    assert found["teacher_prompt_spread"] == pytest.approx(pairs(teacher, LABELS), rel=1e-4)


def test_one_image_a_class_spreads_over_the_batch_and_not_in_a_class() -> None:
    student = torch.randn(3, 2, 4, 4)[LABELS]
    found = logs_of(student, torch.randn(6, 2, 4, 4))
    assert found["x0_spread"] > 0.3
    assert found["x0_prompt_spread"] == pytest.approx(0.0, abs=1e-6)


def test_the_conditional_half_counts_where_a_call_was_guided() -> None:
    signs, x_t = StepSigns(), torch.randn(6, 2, 4, 4)
    plain, guided = pred_of(torch.zeros(6, 2, 4, 4), x_t), pred_of(torch.randn(6, 2, 4, 4), x_t)
    signs.see("student", pred_of(torch.randn(6, 2, 4, 4), x_t, grad=True))
    both = Prediction(guided.raw, x_t, guided.t, guided.path, "flow", {}, plain.raw)
    signs.see("teacher", both)
    assert float(signs.logs(batch_of(LABELS))["teacher_spread"]) == pytest.approx(0.0, abs=1e-6)
    assert signs.rows == 6 * 3 + 6 * 2  # with gradients threefold, guided twice


def test_errors_of_fake_and_teacher_are_of_the_same_noised_samples() -> None:
    signs, x_t = StepSigns(), torch.randn(6, 2, 4, 4)
    x0 = torch.randn(6, 2, 4, 4)
    signs.see("student", pred_of(x0, torch.randn(6, 2, 4, 4), grad=True))
    signs.see("teacher", pred_of(x0 + 1.0, x_t))
    signs.see("fake", pred_of(x0 + 2.0, x_t))
    found = signs.logs(batch_of(LABELS))
    assert float(found["teacher_error"]) == pytest.approx(1.0, rel=1e-4)
    assert float(found["fake_error"]) == pytest.approx(4.0, rel=1e-4)
    signs.see("fake", pred_of(x0, x_t.clone()))
    assert "fake_error" not in signs.logs(batch_of(LABELS))


def test_a_loss_that_asks_no_teacher_has_no_signs() -> None:
    signs, data = StepSigns(), torch.randn(6, 2, 4, 4)
    signs.see("student", pred_of(torch.randn(6, 2, 4, 4), data, grad=True))
    assert signs.logs(batch_of(LABELS, data)) == {}


def test_a_loss_that_trains_no_student_has_no_signs() -> None:
    signs = StepSigns()
    signs.see("student", pred_of(torch.randn(6, 2, 4, 4), torch.randn(6, 2, 4, 4)))
    assert signs.logs(batch_of(LABELS)) == {}
    assert signs.rows == 6


def checks() -> SignChecks:
    return SignChecks(WatchdogConfig(sign_window=30), logging_steps=10)


def line(ratio: float, name: str = "prompt_spread") -> dict[str, float]:
    """A log line with that ratio of root-mean-square distances."""
    return {f"student/x0_{name}": ratio**2, f"student/teacher_{name}": 1.0}


def told(checks: SignChecks, ratios, done=0.0, make=line) -> list[int]:
    """The lines at which something was bad."""
    return [i for i, ratio in enumerate(ratios) if checks.bad(make(ratio), done)]


def test_a_fall_that_lasts_is_told_and_one_line_is_not() -> None:
    assert told(checks(), [1.2, 1.2, 1.2, 0.1, 1.2, 1.2, 1.2]) == []
    assert told(checks(), [1.2, 1.2, 1.2, 0.2, 0.2, 0.2]) == [4, 5]


def test_a_student_that_begins_as_a_blur_is_given_a_quarter_of_the_run() -> None:
    assert told(checks(), [0.1] * 8, done=0.24) == []
    assert told(checks(), [0.1] * 8, done=0.25) == [2, 3, 4, 5, 6, 7]
    rising = [0.1 * 1.2**i for i in range(12)]
    assert told(checks(), rising[:4], done=0.1) == []


def test_one_that_has_left_its_blur_is_left_in_peace_after_that_quarter() -> None:
    made = checks()
    assert told(made, [0.1, 0.1, 0.1, 0.2, 0.25, 0.3], done=0.2) == []
    assert told(made, [0.3, 0.33, 0.37, 0.4], done=0.5) == []


def test_a_fake_that_knows_less_than_the_teacher_is_told() -> None:
    def make(ratio: float) -> dict[str, float]:
        return {"student/fake_error": ratio, "student/teacher_error": 1.0}

    assert told(checks(), [1.0, 1.1, 0.9, 1.0, 1.1], done=0.5, make=make) == []
    assert told(checks(), [1.0, 1.0, 1.0, 1.6, 1.7, 1.7], make=make) == [4, 5]
    (text,) = (c.bad(make(1.6), 0.5) for c in [_filled(make)])
    assert text == {
        "fake_error": "the fake's error on the student's samples is 1.6 of the teacher's"
    }


def _filled(make) -> SignChecks:
    made = checks()
    for _ in range(2):
        made.bad(make(1.6), 0.5)
    return made


def test_what_is_remembered_survives_a_checkpoint() -> None:
    first, second = checks(), checks()
    told(first, [1.2, 1.2, 1.2, 0.2])
    second.load_state_dict(first.state_dict())
    assert told(second, [0.2, 0.2]) == [0, 1]
    second.load_state_dict(None)
