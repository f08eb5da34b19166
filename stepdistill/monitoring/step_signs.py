"""Signs of a collapse that a training step has anyway: from its networks' predictions, whatever the
method, at no further call.

Spread: the mean squared distance of two samples' x0, over the batch and over those with the same
condition. With x0 drawn as the teacher draws, the teacher's E[x0 | x_t] at the same noised samples
has Var(E[x0 | x_t]) <= Var(x0) (law of total variance), so the student's spread over the teacher's
is 1 or above, and goes to 0 where it draws one image: the noise alone then moves what the teacher
makes of x_t. Guidance stretches predictions, so the conditional half is taken.
Error: E |x0 - fake|^2 over E |x0 - real|^2 on the student's noised samples x_t. The mean of the
student's own x0 given x_t is what minimises the first, so a fake that keeps up is at 1 or below;
the gap is the divergence that is matched (Verdu 2010, "Mismatched estimation and relative
entropy", IEEE Trans. Inf. Theory 56(8)).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.core.denoiser import Prediction
from stepdistill.core.types import ON_HOST, Batch, Cond

from .progress import Progress

_SPREADS = ("spread", "prompt_spread")  # over the batch, over samples of the same condition
_GRADIENT_ROWS = 3  # forward, and a backward of two


class StepSigns:
    """Sees the predictions of one loss. rows: samples asked about, with gradients threefold."""

    def __init__(self) -> None:
        self.rows = 0
        self._last: dict[str, Prediction] = {}

    def see(self, role: str, pred: Prediction) -> None:
        """Keep the student's last prediction with gradients, and the others' last."""
        self.count(role, pred)
        if role != "student" or pred.raw.requires_grad:
            self._last[role] = replace(pred, features={})  # those may be large

    def count(self, role: str, pred: Prediction) -> None:
        """Count the samples of a prediction, of which nothing is kept."""
        calls = 1 if pred.unguided is None else 2
        self.rows += len(pred.t) * calls * (_GRADIENT_ROWS if pred.raw.requires_grad else 1)

    @torch.no_grad()
    def logs(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars on the device; none of a loss that trains no student or asks no teacher: one that
        regresses on data goes by way of their mean, and no collapse can be told from that."""
        if "student" not in self._last:
            return {}
        student = _x0(self._last["student"])
        teacher, fake = self._last.get("teacher"), self._last.get("fake")
        values: dict[str, Tensor] = {}
        if teacher is None or teacher.raw.shape != student.shape:
            return values
        real = _x0(teacher)
        if len(student) > 1:
            values |= _spreads("x0", student, batch.cond) | _spreads("teacher", real, batch.cond)
        if fake is not None and teacher.x_t is fake.x_t:
            for name, x0 in (("teacher", real), ("fake", _x0(fake))):
                values[f"{name}_error"] = (student - x0).square().mean()
        return values


def _x0(pred: Prediction) -> Tensor:
    """(B, C, *S) float32 without graph and guidance."""
    raw = pred.raw if pred.unguided is None else pred.unguided
    return pred.path.convert(raw.detach(), pred.x_t.detach(), pred.t, pred.kind, "x0").float()


def _spreads(name: str, x: Tensor, cond: Cond) -> dict[str, Tensor]:
    """Half the mean squared distance, per value, of two samples (B, C, *S): of all pairs, and the
    share of it in those of the same condition (which is 0 where there are none)."""
    rows = x.flatten(1)
    rows = rows - rows.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        product = rows @ rows.T / rows.shape[1]
    size = product.diagonal()
    distance = size[:, None] + size[None] - 2.0 * product
    scale = 0.5 / (len(x) * (len(x) - 1))
    same = _same_condition(cond)
    values = ((distance * of).sum() * scale for of in (torch.ones_like(same), same))
    return {f"{name}_{kind}": value for kind, value in zip(_SPREADS, values, strict=True)}


def _same_condition(cond: Cond) -> Tensor:
    """(B, B): whether two samples have the same condition, by two sums of it: a condition is large,
    and comparing it value by value would cost B^2 times that."""
    same = torch.ones((), dtype=torch.bool)
    for name, value in cond.tensors.items():
        if name not in ON_HOST and value.numel():
            flat = value.detach().float().reshape(len(value), -1)
            ramp = torch.linspace(0.5, 1.5, flat.shape[1], device=flat.device)
            for key in (flat.mean(1), (flat * ramp).mean(1)):
                same = same.to(key.device) & (key[:, None] == key[None])
    return same


class SignChecks:
    """Judges log lines by the medians over the last sign_window updates."""

    def __init__(self, config: WatchdogConfig, logging_steps: int) -> None:
        self._config = config
        self._lines = max(3, math.ceil(config.sign_window / logging_steps))
        self._recent: dict[str, deque[float]] = {}
        self._progress = Progress()

    def bad(self, values: Mapping[str, float], done: float) -> dict[str, str]:
        """check -> what is wrong now. Call once a planned log line, with its means."""
        alarms: dict[str, str] = {}
        for check, name, value, threshold in self._signs(values):
            recent = self._recent.setdefault(name, deque(maxlen=self._lines))
            recent.append(value)
            if getattr(self._config, check) == "off" or len(recent) < self._lines:
                continue
            usual = statistics.median(recent)
            if self._progress.bad(name, usual, threshold, done):
                ratio = usual if check == "fake_error" else 1.0 / usual
                alarms.setdefault(check, f"{_MEANING[name]} is {ratio:.3g} of the teacher's")
        return alarms

    def _signs(self, values: Mapping[str, float]) -> Iterator[tuple[str, str, float, float]]:
        """(check, name, value that should be low, threshold) of what the line has."""
        config = self._config
        for name in _SPREADS:
            student, teacher = (values.get(f"student/{of}_{name}", 0.0) for of in ("x0", "teacher"))
            if teacher > 0.0:
                yield (
                    "spread",
                    name,
                    (teacher / max(student, 1e-12)) ** 0.5,
                    1.0 / config.min_spread,
                )
        fake, real = (values.get(f"student/{of}_error", 0.0) for of in ("fake", "teacher"))
        if real > 0.0:
            yield "fake_error", "fake_error", fake / real, config.max_fake_error

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, **self._progress.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up a saved state; none is of a run begun without these checks."""
        if state is None:
            return
        self._recent = {k: deque(v, maxlen=self._lines) for k, v in state["recent"].items()}
        self._progress.load_state_dict(state)


_MEANING = {
    "spread": "the spread of the student's x0 over a batch",
    "prompt_spread": "the spread of the student's x0 under the same condition",
    "fake_error": "the fake's error on the student's samples",
}
