"""Validation that nobody asked for: on prompts of the run's own data, for under 2 % of its cost.

Cost is counted, not timed, so that a run validates at the same steps on every machine and when it
is resumed: in rows, samples that a network is asked about (a sample with gradients is 3, a guided
one 2), as they were counted in the run's first steps. A call of fewer samples than a training batch
counts as one of a batch: small networks take as long for both, and no call takes longer. What no
row stands for (pictures, text encoders) is allowed for by a count below the promise.
Where even a small grid does not fit, there is none, and the run says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stepdistill.config.run import TrainConfig
from stepdistill.core.denoiser import is_guided
from stepdistill.core.method import Method
from stepdistill.monitoring.fake_lag import LAG_TIMES
from stepdistill.monitoring.reference import probe_times, teacher_guidance
from stepdistill.reporting.values import counted

PROMISED_SHARE = 0.02
_COUNTED_SHARE = 0.015
_MOST, _FEWEST = 20, 4  # validations of a run; two bad ones in a row make an alarm
PROMPTS = 4
_STEPS_SEEN = 16  # student updates in which the prompts are looked for
_DECODED_ROWS = 4  # a decoded image: SDXL's VAE at 1024 px takes some four passes of its UNet


@dataclass(frozen=True)
class Grid:
    """What each validation draws."""

    prompts: int
    images: int
    teacher_steps: int

    def rows(self, method: Method[Any], args: TrainConfig) -> tuple[int, int]:
        """(rows of the teacher's reference, rows of one validation)."""
        spec, images = method.sampler(), self.prompts * self.images
        batch, decoding = args.train_batch_size, images * _DECODED_ROWS
        calls = math.ceil(images / batch)  # of a network, where a batch is the most at once
        probes = len(probe_times(spec))
        each = (spec.num_steps * (2 if is_guided(spec.guidance) else 1)) * calls
        reference = 0
        if self.teacher_steps:
            guided = is_guided(teacher_guidance(method, args))
            passes = (self.teacher_steps + probes) * (2 if guided else 1)
            passes += self.teacher_steps if guided else 0
            reference = passes * calls * batch + decoding * (2 if guided else 1)
            each += probes * calls
        if (fit := method.fake_fit) is not None:
            scores = [fit.teacher, fit.fitted, *([fit.fake] if fit.fake != fit.fitted else [])]
            lag = len(LAG_TIMES) * sum(2 if is_guided(g) else 1 for g in scores)
            stops = range(spec.num_steps if fit.last_step else 1, spec.num_steps + 1)
            each += sum(stop + lag for stop in stops) * math.ceil(images / len(stops) / batch)
        return reference, each * batch + decoding


@dataclass(frozen=True)
class Schedule:
    """A validation every `every` student updates and at the end; 0 is none. share: of the run's
    rows."""

    every: int
    grid: Grid
    share: float = 0.0

    def said(self, prompts: Sequence[str], steps: int) -> dict[str, Any]:
        """What run.json says of it, for a run of that many updates."""
        if not self.every:
            few = f"{counted(steps, 'update')} {'is' if steps == 1 else 'are'} too few"
            why = f"{few} for some within {PROMISED_SHARE:.0%} of the cost"
            return {"steps": 0, "why": why}
        grid = {**asdict(self.grid), "prompts": list(prompts)}
        return {"steps": self.every, "share": round(self.share, 5), **grid}


def schedule(
    method: Method[Any], args: TrainConfig, rows_per_step: float, num_prompts: int, steps: int
) -> Schedule:
    """As many validations as fit, of the largest grid that fits _FEWEST times.

    Args: rows_per_step: of a student update. num_prompts: how many the data has shown, or args
        name. steps: student updates of the run.
    """
    teacher_steps = args.validation_teacher_steps if "teacher" in method.roles() else 0
    named = len(args.validation_prompts)
    images = args.num_validation_images
    grids = [
        Grid(named or min(num_prompts, most), count, teacher_steps)
        for most, count in ((PROMPTS, images), (PROMPTS, 2), (2, 2))
        if count <= images and not (named and count < images)
    ]
    total = rows_per_step * steps
    for grid in grids:
        reference, each = grid.rows(method, args)
        count = min(_MOST, int((_COUNTED_SHARE * total - reference) / each))
        if count >= _FEWEST:
            every = math.ceil(steps / count)
            return Schedule(every, grid, (reference + math.ceil(steps / every) * each) / total)
    return Schedule(0, grids[-1])


class OwnValidation:
    """Decides, in a run's first updates, on its validations, where nothing was said of them.

    Args: why_not: what this run can't be validated by itself for; "" where it can.
    """

    def __init__(self, args: TrainConfig, method: Method[Any], why_not: str = "") -> None:
        self._args, self._method, self._why_not = args, method, why_not
        self.open = args.validation_steps is None
        self._prompts: list[str] = []
        self._rows = 0
        self._chosen: dict[str, Any] = {}  # the options decided on

    @property
    def args(self) -> TrainConfig:
        """The run's options with those that were decided on."""
        return self._args.model_copy(update=self._chosen)

    @property
    def chosen(self) -> bool:
        """Whether validations go by what was decided here."""
        return bool(self._chosen.get("validation_steps"))

    def see(self, raw: Mapping[str, Any], rows: int) -> None:
        """A raw batch of the data (see data.stream.collate), and the rows of the loss on it."""
        if not self.open:
            return
        self._rows += rows
        shown: Sequence[Any] = raw.get("label", raw.get("prompt", ("",)))
        for prompt in shown:
            text = str(prompt.item() if hasattr(prompt, "item") else prompt)
            if len(self._prompts) < PROMPTS and text not in self._prompts:
                self._prompts.append(text)

    def due(self, step: int) -> bool:
        """Whether it is to be decided after `step` updates."""
        args = self._args
        known = len(self._prompts) >= PROMPTS or bool(args.validation_prompts)
        return self.open and (known or step >= min(_STEPS_SEEN, args.max_train_steps))

    def decide(self, step: int, seconds: float) -> dict[str, Any]:
        """Decide after `step` updates in `seconds`; returns what run.json says of it."""
        args, steps, limit = self._args, self._args.max_train_steps, self._args.max_train_seconds
        if limit is not None:
            steps = min(steps, max(1, int(limit * step / max(seconds, 1e-9))))
        self.open = False
        if self._why_not:
            self.leave()
            return {"steps": 0, "why": self._why_not}
        planned = schedule(self._method, args, self._rows / step, len(self._prompts), steps)
        if not planned.every:
            self.leave()
            return planned.said((), steps)
        prompts = args.validation_prompts or self._prompts[: planned.grid.prompts]
        self._chosen = {
            "validation_steps": planned.every,
            "validation_prompts": prompts,
            "num_validation_images": planned.grid.images,
            "validation_teacher_steps": planned.grid.teacher_steps,
        }
        return planned.said(prompts, steps)

    def leave(self) -> None:
        """Make none from now on."""
        self.open, self._chosen = False, {"validation_steps": 0}

    def state_dict(self) -> dict[str, Any]:
        return {
            "open": self.open,
            "prompts": list(self._prompts),
            "rows": self._rows,
            "chosen": dict(self._chosen),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up a saved state; none is of a run begun when validation had to be asked for."""
        if self._args.validation_steps is not None:
            return
        if state is None:
            self.leave()
            return
        self.open, self._rows = state["open"], state["rows"]
        self._prompts, self._chosen = list(state["prompts"]), dict(state["chosen"])
