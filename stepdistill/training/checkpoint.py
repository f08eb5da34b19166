"""checkpoint-N folders: written aside, manifest last, renamed whole; read back only if whole.

Everything is safetensors or JSON: weights of trained and averaged roles, optimiser state, the
method's buffers, the position in the data. Random numbers need no state (see core.context).
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from stepdistill.models.rolebank import RoleBank
from stepdistill.models.safe_files import read_json, read_tensors
from stepdistill.training.whole import MANIFEST, fault_of, write_folder

RUN_FILE = "run.json"  # beside the checkpoints: what the run is
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
STATE_KEYS = (
    "step",
    "batches_seen",
    "seconds",
    "world_size",
    "global_batch",
    "gradient_accumulation_steps",
    "grad_scaler",
    "facts",
)


def _order(folder: Path) -> tuple[int, bool]:
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), found[2] is None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first, whole or not; checkpoint-N.old comes before its heir."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_order)


def newest_valid(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line about each newer one that was skipped."""
    skipped: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {fault}")
    return None, skipped


def prune(newest: Path, limit: int | None) -> None:
    """Delete what is older than the newest `limit` whole checkpoints up to `newest`.

    What a killed save or deletion left lying goes too, and the predecessors of whole checkpoints.

    Args: newest: the checkpoint just written, which is whole.
    Notes: damaged folders don't count towards the limit, and nothing newer is touched: a damaged
        checkpoint-100 must not push the good checkpoint-60 out. Sizes are compared, not hashes.
    """
    for left in newest.parent.glob("checkpoint-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for old in newest.parent.glob("checkpoint-*.old"):
        if fault_of(old.with_suffix("")) is None:
            shutil.rmtree(old, ignore_errors=True)
    if limit is None:
        return
    older = [p for p in list_checkpoints(newest.parent) if _order(p) < _order(newest)]
    whole = [p for p in older if fault_of(p, hashes=False) is None]
    kept = [*whole, newest][-limit:]
    for folder in older:
        if _order(folder) < _order(kept[0]):
            gone = folder.with_name(folder.name + ".tmp")  # half a folder is no checkpoint
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


# ------------------------------------------------------------------ optimiser
def optimizer_state(
    bank: RoleBank, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state by role and parameter name: (tensors, plain values)."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for role in bank.trained_roles:
        for name, param in bank.members(role).items():
            for key, value in optimizer.state.get(param, {}).items():
                full_key = f"{role}/{name}/{key}"
                if isinstance(value, Tensor):
                    tensors[full_key] = value.detach().cpu().contiguous().clone()
                else:
                    plain[full_key] = value
    return tensors, plain


def load_optimizer_state(
    bank: RoleBank,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Put a saved state back, matched by role and parameter name."""
    owners = {
        f"{role}/{name}": param
        for role in bank.trained_roles
        for name, param in bank.members(role).items()
    }
    for full_key, value in [*tensors.items(), *plain.items()]:
        owner, _, key = full_key.rpartition("/")
        if owner not in owners:
            raise ValueError(
                f"checkpoint: expected optimiser state of {sorted(owners)[:2]}..., "
                f"got {owner!r}. Was it saved with another tuning?"
            )
        param = owners[owner]
        if isinstance(value, Tensor) and value.ndim and value.shape != param.shape:
            raise ValueError(
                f"checkpoint: expected optimiser state {full_key} of {tuple(param.shape)}, got "
                f"{tuple(value.shape)}."
            )
        if isinstance(value, Tensor):
            value = value.to(param.device)
        optimizer.state[param][key] = value.clone() if isinstance(value, Tensor) else value


# ----------------------------------------------------------------- whole run
def save_checkpoint(
    folder: Path,
    bank: RoleBank,
    optimizer: Optimizer,
    method_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write checkpoint-N. Call on one process only, between barriers.

    Errors: OSError where it can't be written, naming the newest whole checkpoint.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {
        f"role_{role}": bank.role_state(role) for role in bank.roles if bank.members(role)
    }
    opt_tensors, opt_plain = optimizer_state(bank, optimizer)
    tensors["optimizer"] = opt_tensors
    if method_state:
        tensors["method"] = {k: v.detach().cpu().contiguous() for k, v in method_state.items()}
    try:
        write_folder(folder, tensors, {"trainer_state": dict(state), "optimizer": opt_plain})
    except OSError as err:
        good, _ = newest_valid(folder.parent)
        raise OSError(
            f"{err} Newest whole checkpoint: {good.name if good else 'none yet'}; then go on with "
            "--resume_from_checkpoint latest."
        ) from err


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer_state of a checkpoint. Errors: ValueError naming what is wrong with it."""
    fault = fault_of(folder)
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint: expected a whole checkpoint, got {folder} where {fault}. "
            'Pass "latest" to take the newest whole one.'
        )
    return read_json(folder / "trainer_state.json", STATE_KEYS)


def load_checkpoint(folder: Path, bank: RoleBank, optimizer: Optimizer) -> dict[str, Tensor]:
    """Load weights and optimiser in place; returns the method's saved buffers."""
    for role in bank.roles:
        if bank.members(role):
            bank.load_role_state(role, read_tensors(folder / f"role_{role}.safetensors"))
    plain = read_json(folder / "optimizer.json")
    load_optimizer_state(bank, optimizer, read_tensors(folder / "optimizer.safetensors"), plain)
    method = folder / "method.safetensors"
    return read_tensors(method) if method.is_file() else {}


def student_file(source: str | Path) -> Path:
    """The averaged (else plain) student weights of a run's newest whole checkpoint.

    Errors: ValueError where the folder is neither a whole checkpoint nor a run with one.
    """
    folder = Path(source)
    skipped: list[str] = []
    whole: Path | None = folder
    if not (folder / MANIFEST).is_file():
        whole, skipped = newest_valid(folder)
    for line in skipped:
        warnings.warn(f"init_student_from: {line}", stacklevel=3)
    fault = "no whole checkpoint" if whole is None else fault_of(whole)
    if whole is None or fault is not None:
        raise ValueError(
            f"init_student_from: expected a run or checkpoint folder, got {folder} with {fault}."
        )
    averaged = whole / "role_ema.safetensors"
    return averaged if averaged.is_file() else whole / "role_student.safetensors"
