"""What a run is: its teacher, data and settings, by which a resumed run is known to be the same.

Paths say where things lie; here models are known by content and data by hash.
"""

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
from stepdistill.core.method import MethodConfig
from stepdistill.families.family import Family
from stepdistill.loading.identity import differing, identity_of
from stepdistill.loading.place import absolute
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import same_lora
from stepdistill.monitoring.records import FILES
from stepdistill.reporting.values import counted
from stepdistill.storage.checkpoints import list_checkpoints, newest_valid
from stepdistill.storage.files import RUN_FILE, read_json
from stepdistill.storage.folders import refuse_written_on
from stepdistill.training.start import student_base_of

# What must stay the same for a resumed run to be the same run.
_FIXED = (
    "model",
    "revision",
    "expert",
    "student_base",
    "method",
    "method_config",
    "tuning",
    "rewards",
    "seed",
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
    training: bool = True,
) -> dict[str, Any]:
    """What identifies a run, saved beside its results.

    Args: training: whether networks are read that an export does without.
    """
    if isinstance(teacher, Family):
        teacher = ModelSource(teacher.pipeline.name_or_path, expert=teacher.expert)
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "stepdistill")
    student_base = student_base_of(args)
    places = {"student_base": student_base, "decoder": args.decoder if training else None}
    others = {name: identity_of(place) for name, place in places.items() if place is not None}
    return {
        **teacher.facts(),
        "identity": {"teacher": teacher.identity(), **others},
        "student_base": student_base,
        "method": method,
        "method_config": config.model_dump(mode="json"),
        "tuning": args.tuning.model_dump(mode="json"),
        "rewards": [one.model_dump(mode="json") for one in args.rewards],
        "seed": args.seed,
        "draw_law": DRAW_LAW,
        "train_config": args.model_dump(mode="json"),
        "versions": {name: _version(name) for name in packages},
    }


def output_dir_is_ours(args: TrainConfig, facts: Mapping[str, Any]) -> str | None:
    """What to resume from, or None for a fresh run.

    Errors: ValueError where output_dir holds a run and nothing says to resume it, or where it
    holds another run than the one to resume, or files that it would write on.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}.")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir: expected a writable folder, got {folder}.")
    holds_run = (folder / RUN_FILE).exists() or bool(list_checkpoints(folder))
    if holds_run and args.resume_from_checkpoint is None:
        raise ValueError(
            f"output_dir: expected a folder without a run, got {folder}, which holds one. "
            "Pass --resume_from_checkpoint latest to continue it, or another --output_dir."
        )
    if not holds_run:
        refuse_written_on(folder, FILES, "output_dir")
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "latest" and not Path(args.resume_from_checkpoint).is_dir():
        raise ValueError(
            f'resume_from_checkpoint: expected "latest" or a checkpoint folder, '
            f"got {args.resume_from_checkpoint!r}."
        )
    known = _saved_facts(folder)
    if known is not None:
        same_run(known, facts)
        same_data(known.get("data"), facts.get("data"), args.data_changed == "ok")
        for name in ("method_file", "family_file"):
            if facts.get(name, {}).get("sha256") != (known.get(name) or {}).get("sha256"):
                warnings.warn(
                    f"{name}: {(facts.get(name) or known[name])['file']} is not the code that the "
                    "run was begun with; it goes on with what is there now.",
                    stacklevel=2,
                )
    return args.resume_from_checkpoint


def _saved_facts(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder is, by its record, or by its newest checkpoint where that is
    damaged; None where neither says so."""
    try:
        return read_json(folder / RUN_FILE, ("model", "method"))
    except ValueError:
        newest, _ = newest_valid(folder)
    return None if newest is None else dict(read_json(newest / "trainer_state.json")["facts"])


def teacher_is_here(args: TrainConfig, teacher: ModelSource | Family) -> None:
    """Errors: ValueError where a run trained on local files is to go on, and a relative path of
    theirs means nothing in this working directory; it is not looked up on the Hub."""
    if isinstance(teacher, Family) or Path(teacher.model).exists():
        return
    facts = _saved_facts(Path(args.output_dir)) or {}
    files = (facts.get("identity") or {}).get("teacher") or {}
    if files and "commit" not in files:
        raise ValueError(
            f"pretrained_model_name_or_path: expected the local files that the run in "
            f"{args.output_dir} was trained on ({facts.get('model')}), got {teacher.model!r}, "
            "which is not there. Name them by their absolute path."
        )


def same_run(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Errors: ValueError listing what differs between a saved run and this one.

    Models are told apart by content where it is known, then by name: a folder may be moved.
    """
    known = _same_models(saved, facts)
    # Runs begun before these were written down had none.
    earlier = {"expert": "both", "student_base": None, "rewards": [], **saved}
    earlier["tuning"] = {**Tuning().model_dump(mode="json"), **dict(saved.get("tuning") or {})}
    for key in ("model", "student_base"):
        earlier[key] = absolute(earlier[key]) if earlier.get(key) else earlier.get(key)
    differ = {
        key: (earlier.get(key), facts[key])
        for key in _FIXED
        if key not in known and earlier.get(key) != facts.get(key, earlier.get(key))
    }
    was, now = earlier.get("teacher_lora") or [], facts["teacher_lora"]
    if len(was) != len(now) or not all(map(same_lora, was, now)):
        differ["teacher_lora"] = (was, now)
    if differ:
        changes = "; ".join(
            f"{key} {was!r} (saved) against {now!r}" for key, (was, now) in differ.items()
        )
        raise ValueError(
            f"resume_from_checkpoint: expected the settings of the saved run, got {changes}. "
            "Use the saved settings or another --output_dir."
        )


_NAMED_BY = {"teacher": ("model", "revision"), "student_base": ("student_base",), "decoder": ()}


def _same_models(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> set[str]:
    """The settings that name models whose content is the saved run's.

    Errors: ValueError for another content, naming the file.
    """
    known: set[str] = set()
    for role, named_by in _NAMED_BY.items():
        before, now = ((f.get("identity") or {}).get(role) or {} for f in (saved, facts))
        odd = differing(before, now)
        if odd is None:
            continue
        if odd:
            place = facts["train_config"]["decoder"] if role == "decoder" else facts[named_by[0]]
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ValueError(
                f"resume_from_checkpoint: expected the {role} that the run was trained with, got "
                f"another content of {odd[0] or 'its file'}{more} in {place}. Put the earlier "
                "files back, or train anew in another --output_dir."
            )
        known.update(named_by)
    return known


def same_data(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, allowed: bool
) -> bool:
    """Whether a run goes on with the data (data.fingerprint) that it was begun with.

    Errors: ValueError where it does not, and that is not `allowed`.
    """
    if not saved or not now:  # an earlier run's, or an export's
        return True
    changed = []
    for name, was, got in (("data", saved, now), ("data.gan", saved.get("gan"), now.get("gan"))):
        if was and got:
            hashed = was.get("sha256") and got.get("sha256")
            keys = ("buckets", "degradation", *(("sha256",) if hashed else ("source", "items")))
            changed += [(name, was, got)] if any(was.get(k) != got.get(k) for k in keys) else []
    if changed and not allowed:
        name, was, got = changed[0]
        changes = [
            f"{f['source']} of {f['items']} items{' in buckets' * ('buckets' in f)}"
            f"{_made_smaller(f.get('degradation'))}, sha256 {f['sha256']}"
            for f in (was, got)
        ]
        raise ValueError(
            f"{name}: expected the data that the run was begun with ({changes[0]}), got "
            f"{changes[1]}. Give those, or go on with the new ones by --data_changed ok: run.json "
            "and the model card will say so."
        )
    return not changed


def _made_smaller(rule: Mapping[str, Any] | None) -> str:
    return "" if rule is None else f" made smaller by {rule['factor']} ({rule['kind']})"


def resume_fits(
    state: Mapping[str, Any], args: TrainConfig, world_size: int, facts: Mapping[str, Any]
) -> None:
    """Errors: ValueError where the saved run cannot go on exactly under these settings."""
    same_run(state["facts"], facts)
    same_data(state["facts"].get("data"), facts.get("data"), args.data_changed == "ok")
    now = world_size * args.train_batch_size
    if state["global_batch"] != now:
        raise ValueError(
            f"resume_from_checkpoint: expected the saved global batch of {state['global_batch']} "
            f"(saved on {counted(state['world_size'], 'process')}), got {now} = "
            f"{counted(world_size, 'process')} x "
            f"train_batch_size {args.train_batch_size}. Change --train_batch_size so that it fits."
        )
    if state["gradient_accumulation_steps"] != args.gradient_accumulation_steps:
        raise ValueError(
            f"resume_from_checkpoint: expected gradient_accumulation_steps "
            f"{state['gradient_accumulation_steps']} as saved, got "
            f"{args.gradient_accumulation_steps}."
        )
