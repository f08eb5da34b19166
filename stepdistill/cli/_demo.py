"""`stepdistill demo`: the main job on real data, with the commands a user would type.

Data -> teacher -> two students, each by its own `stepdistill train` -> export -> reload in a
fresh process that knows only Diffusers -> report. The students train side by side, one core each.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import yaml
from rich.console import Console

from stepdistill.cli._demo_teacher import equipped
from stepdistill.config.recipes import MethodRecipe, Training, recipe_for
from stepdistill.demo.emoji.subject import EmojiSubject
from stepdistill.demo.metrics import Row
from stepdistill.demo.reload import Job, sample_in_fresh_process
from stepdistill.demo.report import Report, print_report, write_report
from stepdistill.demo.subject import Digits, RowJudge, Subject
from stepdistill.demo.teacher import Teacher, quiet_loading
from stepdistill.demo.verdict import time_check
from stepdistill.monitoring.records import FILES
from stepdistill.reporting.values import any_of, counted
from stepdistill.storage.checkpoints import list_checkpoints
from stepdistill.storage.folders import (
    delete_made,
    refuse_unlike,
    refuse_written_on,
    sign,
)
from stepdistill.storage.owner import owned, refuse_owned

from ._chains import Chain, Stage, watch

STUDENT_STEPS = (1, 4)
PAIRS, PAIRS_OUTPUT = "pairs", "pairs.txt"
PAIR_FILES = ("manifest.json", "shard-*.safetensors", ".*")
# Beside checkpoints and the export, which hold lists of their files.
_OF_A_RUN = (*FILES, "config.yaml", "output.txt", ".checkpoint-*", ".step*", "validation/*.png",
             ".*.stepdistill-*")  # fmt: skip
RUN_FILES = (*_OF_A_RUN, *(f"first/{name}" for name in _OF_A_RUN))


def run_demo(
    output_dir: str = "demo",
    method: str = "dmd2",
    student: str = "full",
    seconds: float | None = None,
    seed: int = 0,
    data: str = "emoji",
    teacher: str | None = None,
) -> Report:
    """Run everything and write OUTPUT_DIR/report.html and report.png.

    Args:
        data: emoji | digits. teacher: folder of the emoji teacher; none means the shipped one.
        method: a recipe's name, or a user's name of a method. student: lora | full.
        seconds: training budget of each student; none means the recipe's number of steps with the
            digits, and 110 with emoji. A short one also shortens the digits' teacher's training.
    Errors: ValueError for an unknown method or an output_dir that is not ours.
    """
    out, recipe = Path(output_dir), recipe_for(method, student)
    subject: Subject
    if data == "emoji":
        subject = EmojiSubject(*([] if teacher is None else [Path(teacher)]))
    else:
        subject = Digits()
    with owned(out, "output_dir"):
        return _run(subject, out, recipe, method, student, seconds, seed)


def _run(
    subject: Subject,
    out: Path,
    recipe: MethodRecipe,
    method: str,
    student: str,
    seconds: float | None,
    seed: int,
) -> Report:
    started, console = time.monotonic(), Console()
    seconds = seconds or subject.seconds
    recipe = recipe.with_first(lambda first: subject.first(first, seconds))
    sizes = [steps for steps in STUDENT_STEPS if steps in recipe.claims]
    runs = {steps: out / f"{method}_{student}_{steps}step" for steps in sizes}
    if not (out / "teacher").is_dir():
        refuse_written_on(out, ("report.html", "report.png", "data"), "output_dir")
    for run in runs.values():
        refuse_owned(run, "output_dir")
        refuse_unlike(run, RUN_FILES, "output_dir")
    quiet_loading()
    torch.set_num_threads(1)  # a second thread saves nothing on networks this small
    line = f"teacher: a text-to-image pipeline of {subject.name} in {out}/teacher"
    console.print(f"[bold]1/4[/bold] {line}")
    made_teacher = subject.teacher(out / "teacher", seconds)
    judge = subject.judge()

    steps_text = any_of(sizes, "step", "and")
    console.print(f"[bold]2/4[/bold] students: {method} ({student}), for {steps_text}")
    subject.write_data(out / "data")
    if recipe.needs_pairs and not made_teacher.cached:
        delete_made(out / PAIRS, PAIR_FILES, "output_dir")  # another teacher's
    stages = {}
    for steps, run in runs.items():
        delete_made(run, RUN_FILES, "output_dir")
        stages[run.name] = _stages(recipe, steps, out, run, subject, seconds, seed)
    pairs = [_pairs(subject, out)] if recipe.needs_pairs else []
    for stage in chain(pairs, *stages.values()):
        line = "  stepdistill " + " ".join(stage.command)
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    if pairs:  # on every core: the students begin to learn at once, each on its own
        watch({subject.name: Chain(out / PAIRS_OUTPUT, pairs)})
    watch({run.name: Chain(run / "output.txt", stages[run.name]) for run in runs.values()})

    console.print("[bold]3/4[/bold] judging teacher and students")
    rows = [judge.floor(subject.seeds), *_teacher_rows(subject, judge, made_teacher)]
    jobs = [Job(runs[steps] / "pipeline", steps) for steps in sizes]
    fresh = sample_in_fresh_process(jobs, judge.prompts, subject.seeds)
    for steps, made in zip(sizes, fresh, strict=True):
        label = f"student, {counted(steps, 'step')}"
        rows.append(judge.score(label, "student", steps, made.samples))

    console.print("[bold]4/4[/bold] report")
    checks = [
        *subject.checks(rows),
        time_check(
            time.monotonic() - started,
            subject.aim_seconds[not made_teacher.cached],
            made_teacher.cached,
        ),
    ]
    report = Report(
        title=f"{subject.title}: {method} ({student}) in {steps_text}",
        rows=rows,
        checks=checks,
        snippet=_snippet(runs[sizes[0]] / "pipeline", sizes[0], subject.prompt),
        facts=[
            *_facts(subject, made_teacher, runs, recipe, fresh[0].pipeline_class, seed),
            *subject.more_time(rows, method, student),
        ],
        num_images=len(judge.prompts),
        num_seeds=len(subject.seeds),
        pictures=subject.pictures,
        note=subject.note,
        right=subject.right,
    )
    html, png = write_report(report, out)
    print_report(report, console)
    console.print(f"\nreport: {html} and {png}", highlight=False)
    return report


def _pairs(subject: Subject, out: Path) -> Stage:
    """The command that makes noise-image pairs for all students that learn from them."""
    command = ["pairs", "--pretrained_model_name_or_path", str(out / "teacher")]
    command += ["--prompts_file", str(out / "data" / "prompts.txt")]
    command += ["--pairs_dir", str(out / PAIRS), "--num_pairs", str(subject.num_pairs)]
    command += ["--num_steps", "7", "--solver", "multistep"]
    command += ["--batch_size", "256"]
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    return Stage("pairs", command, processes=min(cores, len(STUDENT_STEPS)))


def _stages(
    recipe: MethodRecipe,
    steps: int,
    out: Path,
    run: Path,
    subject: Subject,
    seconds: float | None,
    seed: int,
) -> list[Stage]:
    """The commands that train one student: first the regression where the recipe has one."""
    data = {
        "prompts": ("--data.prompts_file", out / "data" / "prompts.txt"),
        "images": ("--data.train_data_dir", out / "data"),
        "pairs": ("--data.pairs_dir", out / PAIRS),
    }
    trainings = recipe.trainings(steps)
    stages = []
    for index, training in enumerate(trainings):
        training = equipped(training, subject, out)
        folder = run if index + 1 == len(trainings) else run / "first"
        exported = training.starts_from == "model"
        command = ["train", "--config", str(_config(training, folder))]
        model = run / "first" / "pipeline" if exported else out / "teacher"
        source, path = data[training.data]
        command += ["--pretrained_model_name_or_path", str(model), source, str(path)]
        command += ["--output_dir", str(folder), "--seed", str(seed)]
        if training.starts_from == "student":
            command += ["--init_student_from", str(run / "first")]
        budget = None if seconds is None else seconds * training.share
        if budget is not None:
            command += ["--max_train_seconds", f"{budget:g}"]
        total = training.settings["max_train_steps"] if budget is None else budget
        stages.append(Stage(training.label, command, folder, total, by_seconds=budget is not None))
    return stages


def _config(training: Training, folder: Path) -> Path:
    """The training's settings as a config file in its run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(dict(training.settings), sort_keys=False))
    return config


def _teacher_rows(subject: Subject, judge: RowJudge, teacher: Teacher) -> list[Row]:
    """The teacher's rows, saved beside its weights for the next demo."""
    saved = teacher.folder / "judged.json"
    if teacher.cached and saved.is_file():
        return Row.load_all(saved)
    rows = [
        replace(row, label=f"teacher, {counted(row.steps or 0, 'step')}")
        for row in judge.teacher_rows(teacher.folder, subject.seeds)
    ]
    Row.save_all(rows, saved)
    sign(teacher.folder)
    return rows


def _snippet(folder: Path, steps: int, prompt: str) -> str:
    return (
        "from diffusers import DiffusionPipeline\n"
        f'pipe = DiffusionPipeline.from_pretrained("{folder}")\n'
        f'pipe("{prompt}", num_inference_steps={steps}, guidance_scale=1)'
        '.images[0].save("image.png")'
    )


def _facts(
    subject: Subject,
    teacher: Teacher,
    runs: dict[int, Path],
    recipe: MethodRecipe,
    pipeline_class: str,
    seed: int,
) -> list[tuple[str, str]]:
    facts = [
        ("data", subject.data),
        ("teacher", f"{counted(teacher.record.steps, 'step')} in {teacher.record.seconds:.0f} s"),
        ("students load as", f"{pipeline_class}, in a fresh process without stepdistill"),
        ("seed", str(seed)),
    ]
    for steps, run in runs.items():
        state = json.loads((list_checkpoints(run)[-1] / "trainer_state.json").read_text())
        updates = counted(state["step"], "update")
        last = recipe.trainings(steps)[-1]
        line = f"{last.label}, {updates} in {state['seconds']:.0f} s, {last.describe()}"
        facts.append((f"{steps}-step student", line))
    return facts
