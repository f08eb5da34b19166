"""Train methods with one budget on one teacher, and judge them alike.

The demo's where no --teacher is given. Without --budget: write the report of what
output_dir holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from stepdistill.comparison.budget import Budget
from stepdistill.config.flags import AT_COMMAS, CommandOptions
from stepdistill.config.layers import merge
from stepdistill.config.places import Here, Model
from stepdistill.core.options import DIFFERENT, Count, Guidance, Seed

if TYPE_CHECKING:
    from stepdistill.comparison.runs import Setups


class Options(CommandOptions):
    output_dir: str
    """Folder of runs, students and report; the same call goes on there."""
    budget: str | None = None
    """Of each student: 240s (of processor time, all threads of its process together, whatever else
    the machine does; on CUDA, of the clock) or 500steps. Judging is not counted."""
    methods: Annotated[tuple[str, ...], AT_COMMAS] = ()
    """Which ones; with a teacher of yours also NAME=FILE.yaml."""
    steps: Annotated[tuple[int, ...], DIFFERENT] = ()
    """Step counts; none means 1 2 4, or a recipe's own."""
    seeds: Annotated[tuple[Seed, ...], DIFFERENT] = (0,)
    """Training seeds."""
    processes: int = 1
    """Runs side by side; they share the processor's cores, unless OMP_NUM_THREADS is set."""
    curve_points: Count = 4
    """Times that a student is judged while it trains, at the end, half, a quarter ... of its
    budget; 1: at the end alone."""
    discard_students: bool = False
    """Keep none of them; else the best seed's pipeline of each method and step count stays in
    OUTPUT_DIR/students."""

    demo_data: Literal["emoji", "digits"] = "emoji"
    """What the demo's teacher draws; see `stepdistill demo`."""
    demo_teacher_steps: Count | None = None
    """The digits' teacher: a shorter training of it."""
    demo_pairs: Count | None = None
    """The demo's teacher: noise-image pairs; none means 4096."""
    demo_noise_seeds: Count | None = None
    """The demo's teacher: noise seeds to judge from; none means 2 of emoji, 5 of digits."""

    teacher: Model | None = None
    """A teacher of yours: pipeline folder or Hub id. What follows goes with it alone."""
    prompts_file: Here | None = None
    """Prompts to train with and to judge by, one a line."""
    train_data_dir: Here | None = None
    """Images; without them methods learn from the teacher's own."""
    reference: Here | None = None
    """Folder of real images to judge by; none: the teacher's images."""
    features: Annotated[tuple[str, ...], DIFFERENT] = ()
    """Feature networks; see stepdistill evaluate."""
    guidance: Guidance | None = None
    """null + g (cond - null), for teacher and every method."""
    student: Literal["lora", "full"] | None = None
    """How students store their weights, for every method."""
    train_batch_size: int | None = Field(default=None, ge=1)
    """For every method."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """For every method."""
    resolution: Count | None = Field(default=None, ge=1)
    """Height and width in px."""
    num_pairs: Count = 1024
    """Noise-image pairs of the teacher."""
    pair_steps: Count = 25
    """Steps of its solver for them."""
    teacher_steps: Annotated[tuple[Count, ...], DIFFERENT] = (1, 2, 4, 8, 50)
    """Step counts that it is judged at."""
    num_prompts: Count | None = None
    """Prompts to judge with; none means all."""
    num_images_per_prompt: Count | None = None
    """Images to judge with of each prompt."""
    batch_size: Count | None = None
    """Images drawn at once."""
    settings: dict[str, Any] = Field(default={})
    """Laid over every method's file; of --config files all keys of a run that aren't options
    here."""

    @model_validator(mode="before")
    @classmethod
    def _settings_of_files(cls, data: Any) -> Any:
        from stepdistill.config.run import RunConfig

        values = {key: value for key, value in data.items() if key in cls.model_fields}
        runs = {key: value for key, value in data.items() if key in RunConfig.model_fields}
        runs = {key: value for key, value in runs.items() if key not in values}
        rest = {key: value for key, value in data.items() if key not in {**values, **runs}}
        if runs:
            values["settings"] = merge(runs, values.get("settings", {}))
        return {**values, **rest}


EVALUATION = ("num_prompts", "num_images_per_prompt", "batch_size")
OWN = (
    "teacher", "prompts_file", "train_data_dir", "reference", "features", "settings", "guidance",
    "student", "train_batch_size", "mixed_precision", "resolution", "num_pairs", "pair_steps",
    "teacher_steps",
)  # fmt: skip


def run(options: Options) -> None:
    """Run what is missing and write the report."""
    _check_given(options)
    from stepdistill.storage.owner import owned

    if options.budget is None:  # a report of what is there, also of a comparison that goes on
        compare(options)
        return
    with owned(Path(options.output_dir), "output_dir"):
        compare(options)


def setups() -> Setups:
    """What a comparison's teacher, data and judge can be, by kind."""
    from stepdistill.cli._demo_teacher import DemoTeacher
    from stepdistill.comparison.user_options import UserOptions
    from stepdistill.comparison.user_teacher import UserTeacher
    from stepdistill.demo.classifier import register_digits
    from stepdistill.demo.emoji.subject import EmojiSubject
    from stepdistill.demo.scorer import register_scorers
    from stepdistill.demo.subject import Digits

    register_digits()
    register_scorers()
    return {
        "digits": lambda out, teacher_steps=None, **options: DemoTeacher(
            out, Digits(teacher_steps), **options
        ),
        "emoji": lambda out, **options: DemoTeacher(out, EmojiSubject(), **options),
        "own": lambda out, **options: UserTeacher(out, UserOptions(**options)),
    }


def compare(args: Options) -> Any:
    """The report.Comparison that the command ends with. Errors: ValueError for wrong options."""
    from stepdistill.comparison import report, runs
    from stepdistill.comparison.students import left_out
    from stepdistill.storage.folders import refuse_written_on

    out = Path(args.output_dir)
    if args.budget is None:
        return _show(report.write(out), out)
    budget = Budget.parse(args.budget)
    kind, options, settled = _described(args)
    setup = setups()[kind](out, **options)
    methods = _method_names(args.methods)
    chosen = setup.students(methods, args.steps or None)
    if not chosen:
        raise ValueError(f"steps: expected step counts that the methods claim, got {args.steps}.")
    for student in chosen:
        setup.check_settings(student)
    if not (out / runs.PLAN).is_file() and not (out / "results").is_dir():
        refuse_written_on(out, report.FILES, "output_dir")
    runs.check_finished(out, setup, chosen, args.seeds)
    setup.check(chosen)
    absent = left_out(setup.steps_served(methods), chosen)
    more: dict[str, Any] = {"curve_points": args.curve_points, "left_out": absent}
    more["keeps"] = not args.discard_students
    runs.write_plan(out, kind, options, budget, settled, **more)
    for name in methods:
        for line in setup.reasons.get(name, ()):
            print(f"{name}: {line}", flush=True)
    for name, why in absent.items():
        print(f"{name}: left out, {why}", flush=True)
    setup.prepare(setup.needs_pairs(chosen))

    def ended(line: str) -> None:
        print(line, flush=True)
        report.write(out)

    worker = [sys.executable, "-m", "stepdistill.cli._student_run"]
    runs.run_all(out, chosen, args.seeds, args.processes, worker, ended)
    return _show(report.write(out), out)


def _check_given(args: Options) -> None:
    """Before torch is imported. Errors: ValueError for numbers that are too small, names
    given twice, a budget that is none, and what should stand beside --teacher."""
    least = {"curve_points": args.curve_points, "processes": args.processes}
    for name, value in {**least, "steps": min(args.steps, default=1)}.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}.")
    if len({*(names := _method_names(args.methods))}) < len(names):
        raise ValueError(f"methods: expected different names, got {names}.")
    if args.budget is None:
        if args.methods:
            raise ValueError("budget: expected such as 240s beside --methods, got none.")
        return
    Budget.parse(args.budget)
    if args.teacher is None:
        stray = [name for name in (*OWN, *EVALUATION) if name in args.model_fields_set]
        if stray:
            raise ValueError(f"{stray[0]}: expected it beside --teacher alone, got no teacher.")
        if args.demo_teacher_steps is not None and args.demo_data != "digits":
            raise ValueError(
                "demo_teacher_steps: expected it beside --demo_data digits alone, whose teacher is "
                f"trained here, got {args.demo_data}."
            )
        return
    for name in ("prompts_file", "features", "methods"):
        if not getattr(args, name):
            hint = " `stepdistill features train` makes a network." if name == "features" else ""
            raise ValueError(f"{name}: expected it beside --teacher, got none.{hint}")
    if not Path(str(args.prompts_file)).is_file():
        raise ValueError(f"prompts_file: expected a text file, got {args.prompts_file!r}.")


def _described(args: Options) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind of setup, its options, those that must not change between calls)."""
    if args.teacher is None:
        given = {
            "teacher_steps": args.demo_teacher_steps,
            "pairs": args.demo_pairs,
            "noise_seeds": args.demo_noise_seeds,
        }
        options = {name: value for name, value in given.items() if value is not None}
        return args.demo_data, options, options
    from stepdistill.comparison.user_options import UserOptions, split_methods

    if args.guidance is None:
        print(
            "guidance: none given, so each method follows that of its own file (the report says "
            "which), not one teacher. Give --guidance for all.",
            file=sys.stderr,
        )
    user_values = {name: getattr(args, name) for name in OWN if name in args.model_fields_set}
    judging = {n: getattr(args, n) for n in EVALUATION if n in args.model_fields_set}
    user = UserOptions(**user_values, methods=split_methods(args.methods), eval_options=judging)
    return "own", asdict(user), user.settled()


def _method_names(texts: Sequence[str] | None) -> list[str]:
    return [text.partition("=")[0] for text in texts or []]


def _show(result: Any, out: Path) -> Any:
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"report: {out / 'report.html'}")
    return result
