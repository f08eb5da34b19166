"""What can be wrong with a run, said before a weight is loaded and with nothing lost."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stepdistill.config.run import TrainConfig
from stepdistill.config.tuning import Tuning
from stepdistill.core.context import DRAW_LAW
from stepdistill.core.method import Method, MethodConfig, Scorer
from stepdistill.data.stream import provided_fields, sample_item
from stepdistill.families.family import Family
from stepdistill.families.registry import TeacherFacts
from stepdistill.loading.source import ModelSource
from stepdistill.rewards import check_scorers
from stepdistill.roles.student_net import check_student_config
from stepdistill.storage.checkpoints import RUN_FILE, list_checkpoints
from stepdistill.storage.files import read_json
from stepdistill.training.start import student_base_of

# What must stay the same for a resumed run to be the same run.
_FIXED = (
    "model",
    "revision",
    "teacher_lora",
    "student_base",
    "method",
    "method_config",
    "tuning",
    "seed",
)


def method_fits(
    cls: type[Method[Any]],
    config: MethodConfig,
    teacher: TeacherFacts,
    dataset: Any,
    scorers: Mapping[str, Scorer],
    best_metric: str | None = None,
    gan_dataset: Any = None,
) -> None:
    """Errors: ValueError where the datasets lack a field the method's losses read, where a scorer
    they call can't be had (see `rewards.check_scorers`), or where no run of the method measures
    best_metric. Warns of a gan_dataset that no loss reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer builds it again and warns then
        method = cls(config, teacher.setting)
    spec, as_flow = method.sampler(), method.roles()["student"].as_flow
    if as_flow and best_metric == "trajectory_rmse":
        raise ValueError(
            f"best_metric: expected a metric that {cls.name} measures with this config, got "
            "trajectory_rmse: its student leaves the teacher's trajectory. Name teacher_rmse."
        )
    if spec.trained_times is not None:  # else any step count can be exported
        teacher.family.refuse_one_step(teacher.pipeline, as_flow, spec.num_steps)
    if not teacher.has_null:
        _without_guidance(cls, config)
    always = frozenset({"cond"} if teacher.conditioning == "none" else ())

    def fields(data: Any) -> frozenset[str]:
        has = provided_fields(data)
        return always | (
            _without_first_frames(has, sample_item(data)) if teacher.reads_image else has
        )

    has = fields(dataset) | {"null"}
    if gan_dataset is None or "real" not in method.needs:
        has |= {"real"} if "x0" in has else set()
        if gan_dataset is not None:
            warnings.warn(
                f"data.gan has no effect: no loss of {cls.name} reads real samples with this "
                "config. Set --method_config.gan.weight_g, or leave it out.",
                stacklevel=5,
            )
    elif {"cond", "x0"} <= (found := fields(gan_dataset)):
        has |= {"real"}
    else:
        raise ValueError(
            f"data.gan: expected real samples (image or x0) with their prompts or labels, got "
            f"{sorted(found)} from {type(gan_dataset).__name__}. Name a source of images: "
            "--data.gan.train_data_dir DIR."
        )
    if not method.needs <= has:
        hint = {
            "noise": "Make pairs first: stepdistill pairs --config ...",
            "x0": "Train on images: --data.train_data_dir DIR.",
            "real": "Give the GAN images: --data.gan.train_data_dir DIR, or --data.train_data_dir.",
            "prompts": "A loss that reads text needs items with a prompt.",
        }
        missing = sorted(method.needs - has)
        raise ValueError(
            f"{cls.name}: expected batch fields {sorted(method.needs)}, got {sorted(has)} from "
            f"{type(dataset).__name__}. " + " ".join(hint.get(name, "") for name in missing[:1])
        )
    check_scorers(method.scorers(), scorers)


def _without_first_frames(has: frozenset[str], item: Mapping[str, Any]) -> frozenset[str]:
    """The fields that a model which reads an item's image as its first frame still has.

    Errors: ValueError where the item has no image.
    """
    if "image" not in item:
        raise ValueError(
            f"train_dataset: expected items with an image, the video's first frame, got "
            f"{sorted(item)}. Train on images with captions: --data.train_data_dir DIR."
        )
    return has if "x0" in item else has - {"x0"}


def student_fits(
    cls: type[Method[Any]],
    tuning: Tuning,
    teacher: ModelSource | Family,
) -> None:
    """Errors: ValueError for a student architecture that method or model cannot have."""
    changes = tuning.student_changes
    if changes is None:
        return
    if not cls.any_student:
        raise ValueError(
            f"{cls.name}: expected no tuning.student_config (its student is the teacher with "
            "something added), got one. Leave it out."
        )
    check_student_config(changes, teacher)


def _without_guidance(cls: type[Method[Any]], config: MethodConfig) -> None:
    """Errors: ValueError where the method guides its teacher, for a model without a null."""
    for key in cls.guidance_options:
        value = getattr(config, key)
        ends = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, bool) and any(end not in (None, 1.0) for end in ends):
            raise ValueError(
                f"{cls.name}: expected no guidance (the model has no null condition), got {key} "
                f"{value}. Set it to {[1, 1] if isinstance(value, tuple) else 1}."
            )


@cache
def _version(package: str) -> str:
    """Of an installed package; looked up once, as that reads its files."""
    return importlib.metadata.version(package)


def run_facts(
    teacher: ModelSource | Family,
    method: str,
    config: MethodConfig,
    args: TrainConfig,
) -> dict[str, Any]:
    """What identifies a run, saved beside its results."""
    if isinstance(teacher, Family):
        teacher = ModelSource(teacher.pipeline.name_or_path)
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "stepdistill")
    return {
        **teacher.facts(),
        "student_base": student_base_of(args),
        "method": method,
        "method_config": config.model_dump(mode="json"),
        "tuning": args.tuning.model_dump(mode="json"),
        "seed": args.seed,
        "draw_law": DRAW_LAW,
        "train_config": args.model_dump(mode="json"),
        "versions": {name: _version(name) for name in packages},
    }


def output_dir_is_ours(args: TrainConfig, facts: Mapping[str, Any]) -> str | None:
    """What to resume from, or None for a fresh run.

    Errors: ValueError where output_dir holds a run and nothing says to resume it, or where it
    holds another run than the one to resume.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}.")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir: expected a writable folder, got {folder}.")
    saved = folder / RUN_FILE
    if args.resume_from_checkpoint is None:
        if saved.exists() or list_checkpoints(folder):
            raise ValueError(
                f"output_dir: expected a folder without a run, got {folder}, which holds one. "
                "Pass --resume_from_checkpoint latest to continue it, or another --output_dir."
            )
        return None
    if args.resume_from_checkpoint != "latest" and not Path(args.resume_from_checkpoint).is_dir():
        raise ValueError(
            f'resume_from_checkpoint: expected "latest" or a checkpoint folder, '
            f"got {args.resume_from_checkpoint!r}."
        )
    if saved.exists():
        same_run(read_json(saved), facts)
    return args.resume_from_checkpoint


def same_run(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Errors: ValueError listing what differs between a saved run and this one."""
    # Runs begun before these were written down had none.
    earlier = {"teacher_lora": [], "student_base": None, **saved}
    earlier["tuning"] = {**Tuning().model_dump(mode="json"), **dict(saved.get("tuning") or {})}
    differ = {
        key: (earlier.get(key), facts[key]) for key in _FIXED if earlier.get(key) != facts[key]
    }
    if differ:
        told = "; ".join(
            f"{key} {was!r} (saved) against {now!r}" for key, (was, now) in differ.items()
        )
        raise ValueError(
            f"resume_from_checkpoint: expected the settings of the saved run, got {told}. "
            "Use the saved settings or another --output_dir."
        )


def resume_fits(
    state: Mapping[str, Any], args: TrainConfig, world_size: int, facts: Mapping[str, Any]
) -> None:
    """Errors: ValueError where the saved run cannot go on exactly under these settings."""
    same_run(state["facts"], facts)
    now = world_size * args.train_batch_size
    if state["global_batch"] != now:
        raise ValueError(
            f"resume_from_checkpoint: expected the saved global batch of {state['global_batch']} "
            f"(saved on {state['world_size']} processes), got {now} = {world_size} processes x "
            f"train_batch_size {args.train_batch_size}. Change --train_batch_size so that it fits."
        )
    if state["gradient_accumulation_steps"] != args.gradient_accumulation_steps:
        raise ValueError(
            f"resume_from_checkpoint: expected gradient_accumulation_steps "
            f"{state['gradient_accumulation_steps']} as saved, got "
            f"{args.gradient_accumulation_steps}."
        )
