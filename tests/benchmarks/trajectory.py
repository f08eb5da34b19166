"""How wrong one call is along the teacher's trajectory, by time, of methods that learn it.

    python tests/benchmarks/trajectory.py --output_dir runs/trajectory --seconds 60

The demo's teacher solves its ODE in 100 unguided DDIM steps from the same noise for all. A student
is given its state x_t and says in one call where that ends (x0); `boot`, which sees the noise alone
and is told the time, says the signal (x_t - sigma eps) / alpha of that state. Error: root mean
square over samples and values, in standard deviations of the teacher's x0 (1 is no better than a
constant). Beside the students the teacher's own x0 prediction. Writes trajectory.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.cli.compare import setups
from stepdistill.comparison.cost import measure, train
from stepdistill.comparison.students import Student
from stepdistill.core.solvers import boundary_x0
from stepdistill.core.types import Cond
from stepdistill.methods.boot import BOOT
from stepdistill.monitoring.reference import rms
from stepdistill.reporting.charts import Chart, Curve
from stepdistill.reporting.plots import save_charts
from stepdistill.reporting.style import CYCLE
from stepdistill.sampling import keyed_noise
from stepdistill.trainers import DistillationTrainer

METHODS = ("boot", "consistency", "ctm", "meanflow")
STEPS, SAMPLES, SEED = 100, 64, 7
Errors = list[tuple[float, float]]  # (time, error)


def teachers_states(trainer: DistillationTrainer, cond: Cond, eps: Tensor) -> list[Tensor]:
    """x_t of its ODE at times 1, 1 - 1 / STEPS, ..., 0."""
    teacher, path = trainer.bank["teacher"], trainer.family.path
    states = [path.prior(eps)]
    for k in range(STEPS, 0, -1):
        t, s = (torch.full((len(eps),), i / STEPS, dtype=torch.float64) for i in (k, k - 1))
        pred = teacher(states[-1], t, cond)
        states.append(pred.x0 if k == 1 else pred.step(s))
    return states


def errors_of(trainer: DistillationTrainer, states: Sequence[Tensor], cond: Cond) -> Errors:
    """Of the student's single calls, from noise to data."""
    if isinstance(trainer.method, BOOT):
        return signal_errors(trainer, states, cond)
    student, spec = trainer.student(), trainer.method.sampler()

    def says(x_t: Tensor, t: Tensor) -> Tensor:
        w = None if spec.w is None else torch.full_like(t, spec.w).float()
        pred = student(x_t, t, cond, w=w, s=torch.zeros_like(t) if spec.tells_end else None)
        return boundary_x0(pred, spec.boundary_scale, spec.boundary_sigma)

    return along(states, says)


def along(states: Sequence[Tensor], says: Any) -> Errors:
    """Errors of x0 = says(x_t, t) at every tenth of the times."""
    spread, made = float(states[-1].std()), []
    for k in range(0, STEPS, STEPS // 10):
        t = torch.full((len(states[k]),), 1.0 - k / STEPS, dtype=torch.float64)
        made.append((float(t[0]), rms(says(states[k], t) - states[-1]) / spread))
    return made


def signal_errors(trainer: DistillationTrainer, states: Sequence[Tensor], cond: Cond) -> Errors:
    """Of boot's signals at its own grid times, the start left out, where there is no signal yet."""
    method: Any = trainer.method
    path, eps, spread, made = trainer.family.path, states[0], float(states[-1].std()), []
    for index in range(method.config.num_grid - 1, -1, -1):
        point = torch.full((len(eps),), index)
        _, s = method.grid.pair(point)
        k = round(STEPS * (1.0 - float(s[0])))
        at = torch.full_like(s, 1.0 - k / STEPS)  # the state nearest in time
        alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in path.coeffs(at))
        signal = states[k] if k == STEPS else (states[k] - sigma * eps) / alpha
        error = method.signal(trainer.bank, eps, point, cond) - signal
        made.append((float(s[0]), rms(error) / spread))
    return made


@torch.no_grad()
def judged(trainer: DistillationTrainer, name: str, prompts: Path) -> dict[str, Errors]:
    """Errors of the teacher's own predictions, and of the student of that name."""
    texts = prompts.read_text().splitlines()
    cond = trainer.family.encode((texts * SAMPLES)[:SAMPLES])
    eps = keyed_noise(trainer.family.sample_shape(), SEED, range(SAMPLES))
    states, teacher = teachers_states(trainer, cond, eps), trainer.bank["teacher"]
    naive = along(states, lambda x, t: teacher(x, t, cond).x0)
    return {"teacher": naive, name: errors_of(trainer, states, cond)}


def main(argv: Sequence[str] | None = None) -> dict[str, Errors]:
    """Train what is missing and draw; returns method -> errors."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--output_dir", required=True, type=Path)
    flags.add_argument("--seconds", type=float, default=60.0, help="of one core, each student")
    args = flags.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    setup, file = setups()["digits"](args.output_dir), args.output_dir / "trajectory.json"
    setup.prepare(False)
    made: dict[str, Errors] = json.loads(file.read_text()) if file.is_file() else {}
    for name in METHODS:
        if name in made:
            continue
        (training,) = setup.trainings(Student(name, (1,)))
        cost = measure(setup, training, args.output_dir / "probe", args.seconds)
        updates = cost.updates_in(args.seconds)
        trainer = setup.trainer(training, updates, args.output_dir / name, seed=0)
        train(trainer, updates, saves=False)
        made |= judged(trainer, name, (args.output_dir / "data" / "prompts.txt"))
        print(name, updates, "updates", [f"{t:.2f}: {error:.3f}" for t, error in made[name]])
        file.write_text(json.dumps(made, indent=1) + "\n")
    curves = [
        Curve(name, *zip(*errors, strict=True), [0.0] * len(errors), colour, values=False)
        for (name, errors), colour in zip(made.items(), CYCLE, strict=False)
    ]
    chart = Chart("Error of one call along the trajectory", "time", curves, log_x=False)
    save_charts(args.output_dir / "trajectory.png", [chart], columns=1)
    return made


if __name__ == "__main__":
    main()
