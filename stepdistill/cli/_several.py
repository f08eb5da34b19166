"""Runs in one folder, one after another: what a later call must repeat, and what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.config.run import RunConfig
from stepdistill.storage.checkpoints import newest_valid, step_of
from stepdistill.training.checkpoint import read_state

# Options that change neither a student nor its data: a later call may say others.
_FREE = {"export_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "report_to"}
_FREE |= {"disable_progress_bar", "logging_steps", "checkpointing_steps", "checkpoints_total_limit"}
_FREE |= {"dataloader_num_workers", "recipe"}


def plain_options(run: RunConfig, **more: Any) -> dict[str, Any]:
    """All that the runs follow from, as JSON gives it back."""
    read: dict[str, Any] = json.loads(json.dumps({**run.model_dump(), **more}))
    return read


def refuse_other_options(folder: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Errors: ValueError naming the first option that is another than the folder was begun with."""
    odd = [name for name in now if name not in _FREE and was.get(name) != now[name]]
    if odd:
        raise ValueError(
            f"output_dir: expected the options that {folder} was begun with, got "
            f"another {odd[0]}: {now[odd[0]]!r} in place of {was.get(odd[0])!r}. Say the "
            "earlier one, or choose another folder."
        )


def is_trained(run: RunConfig) -> bool:
    """Whether its newest whole checkpoint is at the run's last update, or its time was up."""
    checkpoint, _ = newest_valid(Path(run.output_dir))
    if checkpoint is None:
        return False
    spent, most = float(read_state(checkpoint)["seconds"]), run.max_train_seconds
    return step_of(checkpoint) >= run.max_train_steps or (most is not None and spent >= most)
