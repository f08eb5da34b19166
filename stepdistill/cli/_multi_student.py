"""Multi-student distillation: a partition, the base method on each part, a routed pipeline.

OUTPUT_DIR/multi_student.json    the options it was begun with, the router, the sizes of the shares
OUTPUT_DIR/prompts-K.txt         the share of student K, in the order of the whole
OUTPUT_DIR/student-K/            an ordinary run on it

Source: Song et al. 2024 (MSD), arXiv:2410.23274. Differs from the paper: students are adapters on
one base, and begin at the teacher, so there is no teacher score matching.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.cli._several import is_trained, plain_options, refuse_other_options
from stepdistill.config.run import RunConfig
from stepdistill.data.lines import LineFile
from stepdistill.data.partition import balanced_centroids, class_blocks
from stepdistill.export.multi_student import ROUTER, Student, export_students
from stepdistill.export.sampler_at_stop import sampler_at_stop
from stepdistill.families.registry import TeacherFacts, load_encoders, teacher_facts
from stepdistill.loading.project_code import project_module
from stepdistill.reporting.values import counted
from stepdistill.storage.files import read_json, write_text
from stepdistill.storage.folders import refuse_foreign
from stepdistill.storage.ranks import agreed, owned_by_first, process_state
from stepdistill.trainers import ended_run, trainer_of_run
from stepdistill.training.memory import release_memory
from stepdistill.training.sources import open_dataset

RECORD = "multi_student.json"


def train_students(run: RunConfig, num_students: int, reasons: list[str]) -> Path:
    """Split, train what is not trained yet, export; returns the routed pipeline's folder.

    Errors: ValueError for what can't be split or was begun otherwise, before a weight is loaded;
        SystemExit 75 and 76 as of `train_run`.
    """
    out = Path(run.output_dir)
    export_dir = Path(run.export_dir or out / "pipeline")
    prompts = agreed(lambda: _checked(run, num_students, export_dir))[0]
    state = process_state()
    with owned_by_first(out, "output_dir"):
        record = read_json(out / RECORD) if (out / RECORD).is_file() else None
        if record is None:
            if state.is_main_process:
                _split(run, num_students, prompts)
            state.wait_for_everyone()
            record = read_json(out / RECORD)
        if state.is_main_process:
            sizes = ", ".join(map(str, record["sizes"]))
            print(f"{counted(num_students, 'student')}; prompts of each: {sizes}")
        for number in range(num_students):
            part = _part(run, number)
            if is_trained(part):
                continue
            if state.is_main_process:
                print(f"student {number} of {num_students}: {part.output_dir}")
            part._reasons = reasons
            trainer = ended_run(part)
            trainer.accelerator.wait_for_everyone()
            del trainer
            release_memory()
        if state.is_main_process:
            shares = [_part(run, number).data.prompts_file for number in range(num_students)]
            first: list[Any] = [LineFile(str(share))[0] for share in shares]
            if record["conditioning"] == "label":
                first = [int(label) for label in first]
            router = {name: record[name] for name in ROUTER}
            export_students(_students(run, num_students), router, first, export_dir)
            print(f"exported {export_dir}")
            if run.push_to_hub and run.hub_model_id:
                from stepdistill.export.hub import push_folder

                print(push_folder(export_dir, run.hub_model_id, True))
        state.wait_for_everyone()
    return export_dir


def _checked(run: RunConfig, num_students: int, export_dir: Path) -> list[Any]:
    """The prompts or labels, in order. Errors: see `train_students`."""
    facts = teacher_facts(run.source)
    if facts.conditioning == "none":
        raise ValueError(
            "num_students: expected a model with prompts or class labels to share out, got an "
            "unconditional one. Use stepdistill train."
        )
    if facts.needs_images:
        raise ValueError(
            f"num_students: expected a model that a prompt is enough for, got {facts.pipeline}, "
            "which reads an image too. Use stepdistill train."
        )
    if facts.num_nets > 1 or facts.setting.owned != (0.0, 1.0):
        raise ValueError(
            f"num_students: expected a model of one denoiser, got {facts.pipeline} of two experts. "
            "Use stepdistill train."
        )
    if run.data.prompts_file is None:
        raise ValueError(
            f"num_students: expected --data.prompts_file to share out, got {run.data.source}."
        )
    if run.tuning.student != "lora":
        raise ValueError(
            "num_students: expected students that are adapters on one base, got tuning.student "
            f"{run.tuning.student}. Set --tuning.student lora."
        )
    if run.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            "resume_from_checkpoint: expected none or latest, as each student goes on at its own, "
            f"got {run.resume_from_checkpoint!r}."
        )
    refuse_foreign(export_dir, "export_dir")
    dataset = open_dataset(run)
    rows = list(dataset.labels if facts.conditioning == "label" else dataset.prompts)
    distinct = len(set(rows))
    if num_students > distinct:
        raise ValueError(
            f"num_students: expected at most one for each of {distinct} different prompts of "
            f"{run.data.prompts_file}, got {num_students}. Lower it."
        )
    file = Path(run.output_dir) / RECORD
    if file.is_file():
        was, now = (
            read_json(file, ("options", *ROUTER))["options"],
            _options(run, num_students, rows),
        )
        refuse_other_options(run.output_dir, was, now)
    return rows


def _options(run: RunConfig, num_students: int, rows: list[Any]) -> dict[str, Any]:
    """What the students and their shares follow from, as JSON gives it back."""
    fingerprint = LineFile(str(run.data.prompts_file)).sha256
    return plain_options(run, num_students=num_students, prompts=fingerprint)


def _split(run: RunConfig, num_students: int, rows: list[Any]) -> None:
    """Write the shares and the record, which is last."""
    out, facts = Path(run.output_dir), teacher_facts(run.source)
    router, parts = _router(run, facts, rows, num_students)
    shares: list[list[Any]] = [[] for _ in range(num_students)]
    for row, part in zip(rows, parts, strict=True):
        shares[part].append(row)
    sizes = [len(set(share)) for share in shares]
    if 0 in sizes:
        raise ValueError(
            f"num_students: expected prompts that the text encoder tells apart, got shares of "
            f"{sizes}. Lower it, or take out prompts that differ beyond the encoder's last token."
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, share in enumerate(shares):
        write_text(_share(out, number), "".join(f"{row}\n" for row in share))
    options = _options(run, num_students, rows)
    record = {"options": options, "conditioning": facts.conditioning, "sizes": sizes, **router}
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")


def _router(
    run: RunConfig, facts: TeacherFacts, rows: list[Any], num_students: int
) -> tuple[dict[str, Any], list[int]]:
    """(ROUTER's values, the student of each row, by the routed pipeline's own rule)."""
    router: dict[str, Any] = dict.fromkeys(ROUTER)
    if num_students == 1:
        return router, [0] * len(rows)
    code = project_module("multi_student")
    if facts.conditioning == "label":
        bounds = router["bounds"] = class_blocks(rows, num_students)
        return router, [code.block_of(row, bounds) for row in rows]
    distinct = list(dict.fromkeys(rows))
    device = process_state().device
    pipeline = load_encoders(run.source, device).pipeline.to(device)
    points = code.embed(pipeline, distinct)
    centroids, offsets = balanced_centroids(points, num_students, run.seed)
    router |= {"centroids": centroids.tolist(), "offsets": offsets.tolist()}
    chosen = code.nearest(points, centroids, offsets).tolist()
    part = dict(zip(distinct, chosen, strict=True))
    return router, [part[row] for row in rows]


def _share(out: Path, number: int) -> Path:
    return out / f"prompts-{number}.txt"


def _part(run: RunConfig, number: int) -> RunConfig:
    """The ordinary run of one student."""
    out = Path(run.output_dir)
    data = run.data.model_copy(update={"prompts_file": str(_share(out, number))})
    changes = {"output_dir": str(out / f"student-{number}"), "data": data, "export_dir": None}
    changes |= {"resume_from_checkpoint": "latest", "push_to_hub": False, "hub_model_id": None}
    return run.model_copy(update=changes)


def _students(run: RunConfig, num_students: int) -> Iterator[Student]:
    """What `export_students` takes, one student loaded at a time."""
    for number in range(num_students):
        trainer = trainer_of_run(_part(run, number).output_dir)
        role = "ema" if "ema" in trainer.bank else "student"
        spec = sampler_at_stop(trainer.method, trainer.step, trainer.args.max_train_steps, None)
        facts = {**trainer.facts, "step": trainer.step, "seconds": round(trainer.seconds, 1)}
        yield trainer.family, trainer.bank, spec, facts, role
        del trainer
        release_memory()
