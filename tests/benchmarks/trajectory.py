"""How wrong one call is along the teacher's trajectory, by time, of methods that learn it.

    python tests/benchmarks/trajectory.py --output_dir runs/trajectory --seconds 60

The digits' teacher solves its ODE in 100 unguided DDIM steps from the same noise for all. A student
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

import torch
from torch import Tensor

from stepdistill.cli.compare import setups
from stepdistill.comparison.cost import measure, train
from stepdistill.comparison.students import Student
from stepdistill.core.path import expand
from stepdistill.core.solvers import one_call_x0
from stepdistill.core.types import Cond
from stepdistill.methods.boot import BOOT
from stepdistill.monitoring.reference import Reference, rms, solve_reference
from stepdistill.reporting.charts import Chart, Curve
from stepdistill.reporting.plots import save_charts
from stepdistill.reporting.style import CYCLE
from stepdistill.sampling import keyed_noise
from stepdistill.trainers import DistillationTrainer

METHODS = ("boot", "consistency", "ctm", "meanflow")
STEPS, SAMPLES, SEED = 100, 64, 7
Errors = list[tuple[float, float]]  # (time, error)


@torch.no_grad()
def judged(trainer: DistillationTrainer, name: str, prompts: Path) -> dict[str, Errors]:
    """Errors of the teacher's own predictions, and of the student of that name."""
    texts, method, teacher = (
        prompts.read_text().splitlines(),
        trainer.method,
        trainer.bank["teacher"],
    )
    rows, family = (texts * SAMPLES)[:SAMPLES], trainer.family
    options = {"seed": SEED, "validation_teacher_steps": STEPS}
    args, cond = trainer.args.model_copy(update=options), family.encode(rows)
    times = tuple(1.0 - k / 10 for k in range(10))
    told = boot_times(method) if isinstance(method, BOOT) else ()
    made = solve_reference(teacher, family, rows, args, 1.0, (*times, *told), SAMPLES)
    spread = float(made.x0.std())
    errors = {"teacher": [(t, made.errors[t] / spread) for t in times]}
    if isinstance(method, BOOT):
        eps = keyed_noise(family.sample_shape(), SEED, range(SAMPLES))
        wrong = signal_errors(method, trainer, eps, made, cond)
    else:
        wrong, student, spec = [], trainer.student(), method.sampler()
        for t in times:
            at = torch.full((SAMPLES,), t, dtype=torch.float64)
            x0 = one_call_x0(student, spec, made.states[t], at, cond)
            wrong.append((t, rms(x0 - made.x0)))
    return {**errors, name: [(t, error / spread) for t, error in wrong]}


def boot_times(method: BOOT) -> tuple[float, ...]:
    """Its grid times, from noise on, but for the start, where there is no signal yet, and 0."""
    points = torch.arange(1, method.config.num_grid)
    return tuple(method.grid.pair(points)[1].flip(0).tolist())


def signal_errors(
    method: BOOT, trainer: DistillationTrainer, eps: Tensor, made: Reference, cond: Cond
) -> Errors:
    """Of boot's signals (x_t - sigma eps) / alpha at its own times, the last being x0."""
    errors = []
    for t, point in zip(
        (*boot_times(method), 0.0), range(method.config.num_grid)[::-1], strict=True
    ):
        said = method.signal(trainer.bank, eps, torch.full((len(eps),), point), cond)
        if t > 0.0:
            at = torch.full((len(eps),), t, dtype=torch.float64)
            alpha, sigma = (expand(c, eps) for c in trainer.family.path.coeffs(at))
            errors.append((t, rms(said - (made.states[t] - sigma * eps) / alpha)))
        else:
            errors.append((t, rms(said - made.x0)))
    return errors


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
