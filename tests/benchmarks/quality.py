"""Every method on the demo's teacher, for the same time, over several training seeds.

    python tests/benchmarks/quality.py --output_dir runs/quality --seconds 120 --seeds 0 1 2

Writes table.md, results.json and samples.png there: Frechet distance and recall at 1, 2, 4 (and 8)
steps, beside the teacher at the same steps (naive) and at 50. A finished run is never repeated, so
a stopped call goes on where it was; the report is written anew after every run.

Time is seconds of one processor core: each run first measures its own cost of an update, then
trains as many updates as fill the budget, so that schedules end where they should and a busy
machine changes nothing. A recipe's first training is inside the budget; the teacher's pairs, made
once and shared, are not, and their time is stated.
"""

# N images, K classes

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.pairs import PairDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.data.teacher_pairs import make_pairs
from stepdistill.demo.classifier import train_classifier
from stepdistill.demo.data import DIGIT_NAMES, load_digit_splits, prompt_for, write_image_folder
from stepdistill.demo.metrics import Judge, Row
from stepdistill.demo.recipes import RECIPES, Training
from stepdistill.demo.report_images import strip
from stepdistill.demo.run import quiet_loading
from stepdistill.demo.sampling import PipelineSampler
from stepdistill.demo.teacher import TeacherConfig, load_or_train_teacher
from stepdistill.trainers import TRAINER_OF, DistillationTrainer
from stepdistill.training.config import TrainConfig

TEACHER_STEPS = (1, 2, 4, 8, 50)
PAIRS, PAIR_STEPS = 4096, 16
ONE_STEP_RATIO, FOUR_STEP_RATIO = 1.3, 1.1
PROBE = (6, 26)  # updates of the two short runs whose difference is an update's cost


@dataclass(frozen=True)
class Student:
    """One training to do. steps: what it is judged at; the first is the one it is trained for."""

    recipe: str
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.recipe}_{'_'.join(map(str, self.steps))}"

    @property
    def trained_for(self) -> int:
        return self.steps[0]


def students(only: Sequence[str] | None = None) -> list[Student]:
    """Students of the recipes, those of one step or of all steps first."""
    made = []
    for name, recipe in RECIPES.items():
        if only is None or name in only:
            groups = [recipe.claims] if recipe.one_student else [(n,) for n in recipe.claims]
            made += [Student(name, group) for group in groups]
    order = {1: 0, 4: 1, 2: 2}
    return sorted(made, key=lambda student: order[student.trained_for])


# ------------------------------------------------------------------ one run
def make_trainer(
    training: Training, updates: int, out: Path, run: Path, seed: int
) -> DistillationTrainer:
    """A trainer of that many updates in `run`, whose parent holds what it starts from."""
    settings = training.lasting(updates)
    method, options = settings.pop("method"), settings.pop("method_config", {})
    first = run.parent / "first"
    if training.starts_from == "student":
        settings["init_student_from"] = str(first)
    model = first / "pipeline" if training.starts_from == "model" else out / "teacher"
    data: Any = {
        "prompts": lambda: PromptDataset.from_file(out / "data" / "prompts.txt"),
        "images": lambda: ImageFolderDataset(out / "data", None, labels=False),
        "pairs": lambda: PairDataset(out / "pairs"),
    }[training.data]()
    args = TrainConfig(output_dir=str(run), seed=seed, disable_progress_bar=True, **settings)
    return TRAINER_OF[method](model, args, data, method=method, method_config=options)


def seconds_per_update(training: Training, out: Path, scratch: Path) -> float:
    """Processor seconds of one update: a longer run's over a shorter one's, starts cancelled."""
    spent = []
    for updates in PROBE:
        shutil.rmtree(scratch, ignore_errors=True)
        trainer = make_trainer(training, updates, out, scratch, seed=0)
        start = time.process_time()
        trainer.train()
        spent.append(time.process_time() - start)
    shutil.rmtree(scratch)
    return (spent[1] - spent[0]) / (PROBE[1] - PROBE[0])


def run_student(out: Path, student: Student, seed: int, seconds: float) -> None:
    """Train, export and judge one student; its result file is written last."""
    torch.set_num_threads(1)
    quiet_loading()
    work = out / "work" / f"{student.name}_seed{seed}"
    shutil.rmtree(work, ignore_errors=True)
    trainings = RECIPES[student.recipe].trainings(student.trained_for)
    updates, spent = [], 0.0
    for index, training in enumerate(trainings):
        last = index + 1 == len(trainings)
        cost = seconds_per_update(training, out, work / "probe")
        updates.append(max(1, round(training.share * seconds / cost)))
        trainer = make_trainer(
            training, updates[-1], out, work / ("last" if last else "first"), seed
        )
        start = time.process_time()
        trainer.train()
        spent += time.process_time() - start
        if not last and trainings[index + 1].starts_from == "model":
            trainer.export(work / "first" / "pipeline")
    judge = make_judge()
    rows = []
    for steps in student.steps:
        folder = trainer.export(work / f"pipeline_{steps}", steps)
        call = json.loads((folder / "distillation.json").read_text())["call"]
        sampler = PipelineSampler(DiffusionPipeline.from_pretrained(str(folder)), steps, **call)
        rows.append(judge.run(student.recipe, "student", steps, sampler))
    partial = result_file(out, student, seed).with_suffix(".tmp")
    partial.parent.mkdir(parents=True, exist_ok=True)
    Row.save_all(rows, partial)
    facts = {"updates": updates, "cpu_seconds": spent, "seconds": seconds, "seed": seed}
    partial.write_text(json.dumps({**facts, "rows": json.loads(partial.read_text())}) + "\n")
    partial.replace(result_file(out, student, seed))
    shutil.rmtree(work)


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of one result file's content."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(result["rows"]))
        file.flush()
        return Row.load_all(Path(file.name))


def make_judge() -> Judge:
    digits = load_digit_splits()
    return Judge(digits, train_classifier(digits.train))


def result_file(out: Path, student: Student, seed: int) -> Path:
    return out / "results" / f"{student.name}_seed{seed}.json"


# -------------------------------------------------------------------- all runs
def prepare(out: Path) -> list[Row]:
    """Teacher, data and pairs in `out`, each made once; the teacher's rows."""
    torch.set_num_threads(1)
    quiet_loading()
    digits = load_digit_splits()
    teacher = load_or_train_teacher(TeacherConfig(), digits.train, out / "teacher")
    write_image_folder(digits.train, out / "data")
    prompts = out / "data" / "prompts.txt"
    prompts.write_text("".join(f"{prompt_for(k)}\n" for k in range(len(DIGIT_NAMES))))
    took = out / "pairs_seconds.json"
    if not took.is_file():
        shutil.rmtree(out / "pairs", ignore_errors=True)
        start = time.process_time()
        make_pairs(str(teacher.folder), prompts, out / "pairs", num_pairs=PAIRS,
                   num_steps=PAIR_STEPS, batch_size=256)  # fmt: skip
        took.write_text(json.dumps(time.process_time() - start))
    kept = out / "teacher_rows.json"
    if not kept.is_file():
        pipeline, judge = DiffusionPipeline.from_pretrained(str(teacher.folder)), make_judge()
        rows = [
            judge.run("teacher", "teacher", steps, PipelineSampler(pipeline, steps))
            for steps in TEACHER_STEPS
        ]
        Row.save_all([judge.floor(), *rows], kept)
    return Row.load_all(kept)


def run_all(args: argparse.Namespace) -> None:
    """Every missing run, `processes` at a time, all students of a seed before the next seed's."""
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    jobs = [(student, seed) for seed in args.seeds for student in students(args.only)]
    jobs = [job for job in jobs if not result_file(out, *job).is_file()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running: list[tuple[subprocess.Popen[bytes], Student, int]] = []
    (out / "logs").mkdir(exist_ok=True)
    while jobs or running:
        while jobs and len(running) < args.processes:
            student, seed = jobs.pop(0)
            command = [sys.executable, __file__, "--output_dir", str(out), "--run", student.name]
            command += ["--seeds", str(seed), "--seconds", str(args.seconds)]
            with (out / "logs" / f"{student.name}_seed{seed}.txt").open("wb") as log:
                running.append(
                    (
                        subprocess.Popen(command, env=environment, stdout=log, stderr=log),
                        student,
                        seed,
                    )
                )
        time.sleep(0.5)
        for one in [one for one in running if one[0].poll() is not None]:
            running.remove(one)
            state = "done" if one[0].returncode == 0 else f"FAILED (see {out}/logs)"
            print(f"{one[1].name} seed {one[2]}: {state}", flush=True)
            report(out)


# ---------------------------------------------------------------------- report
@dataclass(frozen=True)
class Cell:
    """One recipe at one step count: means over training seeds, and the spread of Frechet."""

    frechet: float
    std: float
    recall: float
    num_seeds: int


def cells(results: Sequence[dict[str, Any]]) -> dict[tuple[str, int], Cell]:
    """(recipe, steps) -> Cell of the results' rows."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for result in results:
        for row in result["rows"]:
            values = (row["frechet"]["mean"], row["recall"]["mean"])
            found.setdefault((row["label"], row["steps"]), []).append(values)
    made = {}
    for key, values in found.items():
        frechet = [value[0] for value in values]
        std = statistics.stdev(frechet) if len(frechet) > 1 else 0.0
        recall = statistics.fmean(value[1] for value in values)
        made[key] = Cell(statistics.fmean(frechet), std, recall, len(values))
    return made


def verdicts(
    table: dict[tuple[str, int], Cell], teacher: dict[int, float]
) -> list[tuple[bool, str]]:
    """(passed, claim): every student beats the naive teacher; the best ones come near 50 steps."""
    made = []
    for (recipe, steps), cell in sorted(table.items()):
        claim = (
            f"{recipe}, {steps} steps: {cell.frechet:.2f} below the teacher's {teacher[steps]:.2f}"
        )
        made.append((cell.frechet < teacher[steps], claim))
    for steps, ratio in ((1, ONE_STEP_RATIO), (4, FOUR_STEP_RATIO)):
        of_steps = {key[0]: cell.frechet for key, cell in table.items() if key[1] == steps}
        if of_steps:
            best = min(of_steps, key=lambda name: of_steps[name])
            reached = of_steps[best] / teacher[50]
            claim = f"best {steps}-step ({best}): {reached:.2f} of the teacher's 50 steps, at most"
            made.append((reached <= ratio, f"{claim} {ratio}"))
    return made


def markdown(table: dict[tuple[str, int], Cell], teacher: Sequence[Row], facts: str) -> str:
    """The table, a row for each recipe, Frechet distance with recall in brackets."""
    counts = (1, 2, 4, 8)
    lines = ["| | " + " | ".join(f"{n} step{'s' * (n > 1)}" for n in counts) + " |"]
    lines += ["|---" * (len(counts) + 1) + "|"]
    naive = {row.steps: f"{row.frechet.mean:.2f} ({row.recall.mean:.2f})" for row in teacher}
    lines += ["| teacher | " + " | ".join(naive[n] for n in counts) + " |"]
    for recipe in dict.fromkeys(key[0] for key in table):
        texts = []
        for n in counts:
            cell = table.get((recipe, n))
            texts.append(f"{cell.frechet:.2f} ± {cell.std:.2f} ({cell.recall:.2f})" if cell else "")
        lines.append(f"| {recipe} | " + " | ".join(texts) + " |")
    fifty = {row.steps: row.frechet.mean for row in teacher if row.steps}
    bars = [f"- {'pass' if ok else 'FAIL'}: {claim}" for ok, claim in verdicts(table, fifty)]
    head = (
        f"Fréchet distance (recall), mean ± deviation over training seeds. Teacher at 50 steps "
        f"{naive[50]}, real images {naive[None]}. {facts}"
    )
    return "\n".join([head, "", *lines, "", *bars, ""])


def report(out: Path) -> list[tuple[bool, str]]:
    """table.md, results.json and samples.png of the results so far; the verdicts."""
    files = sorted((out / "results").glob("*.json"))
    if not files:
        return []
    results = [json.loads(file.read_text()) for file in files]
    teacher = Row.load_all(out / "teacher_rows.json")
    order = {name: index for index, name in enumerate(RECIPES)}
    table = dict(sorted(cells(results).items(), key=lambda item: (order[item[0][0]], item[0][1])))
    seeds, spent = sorted({r["seed"] for r in results}), sorted({r["seconds"] for r in results})
    facts = (
        f"Training seeds {seeds}, {', '.join(f'{s:g}' for s in spent)} s of one core for each "
        f"student; {PAIRS} pairs of {PAIR_STEPS} steps, made once, took "
        f"{json.loads((out / 'pairs_seconds.json').read_text()):.0f} s."
    )
    (out / "table.md").write_text(markdown(table, teacher, facts))
    plain = [{"recipe": key[0], "steps": key[1], **cell.__dict__} for key, cell in table.items()]
    runs = [
        {"run": file.stem, **{key: value for key, value in result.items() if key != "rows"}}
        for file, result in zip(files, results, strict=True)
    ]
    (out / "results.json").write_text(json.dumps({"table": plain, "runs": runs}, indent=1) + "\n")
    pictures = [row for row in teacher if row.steps]
    students_rows = [row for result in results for row in rows_of(result)]
    for key in table:
        pictures.append(next(row for row in students_rows if (row.label, row.steps) == key))
    save_pictures(pictures, out / "samples.png")
    return verdicts(table, {row.steps: row.frechet.mean for row in teacher if row.steps})


def save_pictures(rows: Sequence[Row], path: Path) -> None:
    """The rows' previews, one strip each, named on the left."""
    figure = Figure(figsize=(15, 0.66 * len(rows)), dpi=90)
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(strip(row.previews, len(row.previews)), cmap="gray", vmin=0, vmax=255,
                    interpolation="nearest")  # fmt: skip
        axes.set_axis_off()
        told = f"{row.label}, {row.steps}: {row.frechet.mean:.2f}"
        axes.text(-3, 4, told, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(left=0.18, right=0.995, top=0.995, bottom=0.005, hspace=0.08)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="of one core, each student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="recipes; all where left out")
    parser.add_argument("--run", help="train the student of that name here; used by the others")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[tuple[bool, str]]:
    """Run what is missing, print the table; returns the verdicts."""
    args = parse(argv)
    out = Path(args.output_dir)
    if args.run:
        student = next(one for one in students() if one.name == args.run)
        run_student(out, student, args.seeds[0], args.seconds)
        return []
    run_all(args)
    made = report(out)
    print((out / "table.md").read_text())
    return made


if __name__ == "__main__":
    main()
