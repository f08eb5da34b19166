"""The flags of `stepdistill compare`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .students import Budget, left_out


def parser() -> argparse.ArgumentParser:
    """The demo's digits where no teacher is given."""
    made = argparse.ArgumentParser(
        prog="stepdistill compare",
        description="Train methods with one budget on one teacher, and judge them alike. Without "
        "--budget: write the report of what output_dir holds.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--output_dir", required=True)
    add("--budget", help="of each student: 240s (of one core; on CUDA, of time) or 500steps")
    add("--methods", type=_names, help="comma-separated; of a teacher of yours also NAME=FILE.yaml")
    add("--steps", type=int, nargs="+", help="step counts; default 1 2 4, or a recipe's own")
    add("--seeds", type=int, nargs="+", default=[0], help="training seeds; default 0")
    add("--processes", type=int, default=1, help="runs side by side; default 1")
    add("--curve_points", type=int, help="times that a student is judged while it trains, at the "
        "end, half, a quarter ... of its budget; default 4; 1: at the end alone")  # fmt: skip
    add("--discard_students", action="store_true", help="keep none of them; else the best seed's "
        "pipeline of each method and step count stays in OUTPUT_DIR/students")  # fmt: skip
    demo = made.add_argument_group("the demo's teacher")
    demo.add_argument("--demo_teacher_steps", type=int, help="a shorter training of it")
    demo.add_argument("--demo_pairs", type=int, help="default 4096")
    demo.add_argument("--demo_noise_seeds", type=int, help="to judge from; default 5")
    own = made.add_argument_group("a teacher of yours")
    add = own.add_argument
    add("--teacher", help="pipeline folder or Hub id")
    add("--prompts_file")
    add("--train_data_dir", help="images; without them methods learn from the teacher's own")
    add("--reference", help="folder of real images to judge by; none: the teacher's images")
    add("--features", nargs="+", help="see stepdistill evaluate")
    add("--config", nargs="+", default=[], help="YAML laid over every method's file")
    add("--guidance", type=float, help="null + g (cond - null), for teacher and every method")
    add("--student", choices=("lora", "full"), help="for every method")
    add("--train_batch_size", type=int)
    add("--mixed_precision", choices=("no", "bf16", "fp16"))
    add("--resolution", type=int)
    add("--num_pairs", type=int, help="noise-image pairs of the teacher; default 1024")
    add("--pair_steps", type=int, help="steps of its solver for them; default 25")
    add("--teacher_steps", type=int, nargs="+", help="it is judged at; default 1 2 4 8 50")
    add("--num_prompts", type=int, help="to judge with; default all")
    add("--num_images_per_prompt", type=int)
    add("--batch_size", type=int, help="of sampling")
    return made


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


EVALUATION = ("num_prompts", "num_images_per_prompt", "batch_size")
OWN = (
    "teacher", "prompts_file", "train_data_dir", "reference", "features", "config", "guidance",
    "student", "train_batch_size", "mixed_precision", "resolution", "num_pairs", "pair_steps",
    "teacher_steps",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run what is missing and write the report; a user's mistake is one line and status 1."""
    args = parser().parse_args(list(argv))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs, too
    try:
        compare(args)
    except (ValueError, TypeError, OSError) as err:
        sys.exit("error: " + " ".join(str(err).split()))
    except KeyboardInterrupt:
        print("stopped: the same call goes on.", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(args: argparse.Namespace) -> Any:
    """The report.Comparison that the command ends with. Errors: ValueError for wrong flags."""
    from . import report, runs

    out = Path(args.output_dir)
    if args.budget is None:
        if args.methods:
            raise ValueError("budget: expected such as 240s beside --methods, got none.")
        return _show(report.write(out), out)
    budget, points = Budget.parse(args.budget), _numbers(args)
    kind, options, settled = _described(args)
    ground = runs.make_ground(out, kind, options)
    methods = _method_names(args.methods)
    chosen = ground.students(methods, args.steps)
    if not chosen:
        raise ValueError(f"steps: expected step counts that the methods claim, got {args.steps}.")
    for student in chosen:
        ground.check_settings(student)
    runs.check_finished(out, ground, chosen, args.seeds)
    ground.check()
    absent = left_out(ground.reaches(methods), chosen)
    more = {"curve_points": points, "left_out": absent, "keeps": not args.discard_students}
    runs.write_plan(out, kind, options, budget, settled, **more)
    for name, why in absent.items():
        print(f"{name}: left out, {why}", flush=True)
    ground.prepare(ground.needs_pairs(chosen))

    def told(line: str) -> None:
        print(line, flush=True)
        report.write(out)

    threads = 1 if kind == "digits" else max(1, (os.cpu_count() or 1) // args.processes)
    runs.run_all(out, chosen, args.seeds, args.processes, threads, told)
    return _show(report.write(out), out)


def _numbers(args: argparse.Namespace) -> int:
    """Of points of a curve. Errors: ValueError for numbers that are too small or said twice."""
    from .student_run import CURVE_POINTS

    points = CURVE_POINTS if args.curve_points is None else args.curve_points
    least = {"curve_points": points, "processes": args.processes, "steps": min(args.steps or [1])}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}.")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"seeds: expected different ones from 0 on, got {args.seeds}.")
    return points


def _described(args: argparse.Namespace) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind of ground, its options, those that must not change between calls)."""
    if args.teacher is None:
        stray = [name for name in (*OWN, *EVALUATION) if getattr(args, name) not in (None, [])]
        if stray:
            raise ValueError(f"{stray[0]}: expected it beside --teacher alone, got no teacher.")
        given = {
            "teacher_steps": args.demo_teacher_steps,
            "pairs": args.demo_pairs,
            "noise_seeds": args.demo_noise_seeds,
        }
        options = {name: value for name, value in given.items() if value is not None}
        return "digits", options, options
    from .own_teacher import Own, split_methods

    for name in ("prompts_file", "features", "methods"):
        if not getattr(args, name):
            raise ValueError(f"{name}: expected it beside --teacher, got none.")
    if not Path(args.prompts_file).is_file():
        raise ValueError(f"prompts_file: expected a text file, got {args.prompts_file!r}.")
    if args.guidance is None:
        print(
            "guidance: none given, so each method follows that of its own file (the report says "
            "which), not one teacher. Give --guidance for all.",
            file=sys.stderr,
        )
    told = {name: getattr(args, name) for name in OWN if getattr(args, name) is not None}
    judging = {n: getattr(args, n) for n in EVALUATION if getattr(args, n) is not None}
    own = Own(**told, methods=split_methods(args.methods), eval_options=judging)
    return "own", asdict(own), own.settled()


def _method_names(texts: Sequence[str] | None) -> list[str]:
    return [text.partition("=")[0] for text in texts or []]


def _show(found: Any, out: Path) -> Any:
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"report: {out / 'report.html'}")
    return found
