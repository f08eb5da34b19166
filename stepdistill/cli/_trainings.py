"""A recipe of several trainings: one after another, each from where an earlier call stopped.

OUTPUT_DIR/recipe.json      the options it was begun with
OUTPUT_DIR/NAME/            a training's ordinary run; its pairs, and its export where one is needed
OUTPUT_DIR/loras/FOLDER/    LoRA files of the trainings that say so
OUTPUT_DIR/pipeline/        what the last training exports
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepdistill.cli._several import is_trained, plain_options, refuse_other_options
from stepdistill.config.layers import MadePairs
from stepdistill.config.run import RunConfig
from stepdistill.config.trainings import SeveralTrainings
from stepdistill.loading.source import ModelSource
from stepdistill.pairs.teacher import make_pairs
from stepdistill.storage.files import read_json, write_text
from stepdistill.storage.folders import refuse_foreign
from stepdistill.storage.ranks import agreed, owned_by_first, process_state
from stepdistill.trainers import DistillationTrainer, ended_run, trainer_of_run
from stepdistill.training.memory import release_memory

RECORD = "recipe.json"


@dataclass(frozen=True)
class _Export:
    folder: Path
    num_steps: int | None = None
    format: Literal["pipeline", "lora"] = "pipeline"


def train_recipe(several: SeveralTrainings) -> Path:
    """Train what is not trained yet and export; returns the last training's pipeline.

    Errors: ValueError for other options than it was begun with, before a weight is loaded;
        SystemExit 75 and 76 as of `train_run`.
    """
    parts, state = several.parts, process_state()
    agreed(lambda: _check(several))
    with owned_by_first(several.folder, "output_dir"):
        if state.is_main_process:
            record = {"options": plain_options(several.given), "trainings": [*parts]}
            write_text(several.folder / RECORD, json.dumps(record, indent=1) + "\n")
        state.wait_for_everyone()
        for number, (name, part) in enumerate(parts.items(), start=1):
            if state.is_main_process:
                print(f"training {number} of {len(parts)}, {name}: {part.about}", flush=True)
            if isinstance(part.pairs, MadePairs):
                _make_pairs(several, name, part.pairs)
            _train(several, name)
    if several.given.push_to_hub and several.given.hub_model_id and state.is_main_process:
        from stepdistill.export.hub import push_folder

        print(push_folder(several.export_of([*parts][-1]), several.given.hub_model_id, True))
    state.wait_for_everyone()
    return several.export_of([*parts][-1])


def _check(several: SeveralTrainings) -> None:
    file = several.folder / RECORD
    if file.is_file():
        was = read_json(file, ("options",))["options"]
        refuse_other_options(str(several.folder), was, plain_options(several.given))
    for name in several.parts:
        for export in _exports(several, name, several.runs[name]):
            refuse_foreign(export.folder, "export_dir")


def _make_pairs(several: SeveralTrainings, name: str, pairs: MadePairs) -> None:
    """Those of a training, by its model; a set that is whole is left as it is."""
    given, folder = several.given, several.pairs_of(name)
    source: str | ModelSource = several.model_of(name)
    if not several.parts[name].model_of:
        source = given.source  # with its variant, its LoRA, ...
    assert folder is not None, "asked for where pairs are made"
    prompts = given.data.prompts_file
    made = pairs.model_dump()
    make_pairs(source, prompts, folder, **made, resolution=given.resolution, seed=given.seed)


def _train(several: SeveralTrainings, name: str) -> None:
    """What is not done yet of a training: its updates, then its exports."""
    run = several.run(name)
    exports = [one for one in _exports(several, name, run) if not one.folder.exists()]
    trainer: DistillationTrainer | None = None
    if not is_trained(run):
        trainer = ended_run(run)
    elif exports and process_state().is_main_process:
        trainer = trainer_of_run(run.output_dir)
    for export in exports if trainer else ():
        assert trainer is not None
        trainer.export(export.folder, export.num_steps, export.format)
        trainer.accelerator.print(f"exported {export.folder}")
    process_state().wait_for_everyone()
    del trainer
    release_memory()


def _exports(several: SeveralTrainings, name: str, run: RunConfig) -> Iterator[_Export]:
    """What others load, LoRA files where the student is one, and what the last training makes."""
    parts = several.parts
    if name == [*parts][-1] or any(part.model_of == name for part in parts.values()):
        yield _Export(several.export_of(name))
    if run.tuning.student == "lora":
        for folder, num_steps in parts[name].lora.items():
            yield _Export(several.folder / "loras" / folder, num_steps, "lora")
