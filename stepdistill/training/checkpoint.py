"""checkpoint-N folders: written aside, manifest last, renamed whole; read back only if whole.

Everything is safetensors or JSON: weights of trained and averaged roles, optimiser state, the
method's buffers, the position in the data. Random numbers need no state (see core.context).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from stepdistill.models.rolebank import RoleBank
from stepdistill.models.safe_files import PICKLED, read_json, read_tensors

MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # beside the checkpoints: what the run is
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


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a folder whole or not at all: temporary name, manifest last, fsync, rename.

    Args: tensors: file stem -> tensors. documents: file stem -> JSON-able value.
    """
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for stem, state in tensors.items():
        save_file(dict(state), aside / f"{stem}.safetensors")
    for stem, value in documents.items():
        (aside / f"{stem}.json").write_text(json.dumps(value, indent=2))
    files = sorted(aside.iterdir())
    for path in files:
        _fsync(path)
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
    _fsync(aside / MANIFEST)
    _fsync(aside)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)
    _fsync(target.parent)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a written folder, or None where every file is as the manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as err:
        return f"no readable manifest ({err})"
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLED)
    if pickled:
        return f"{pickled[0]} is pickled, which is not read"
    for name, facts in manifest.items():
        if (
            Path(name).name != name
            or not isinstance(facts, dict)
            or {*facts} != {"bytes", "sha256"}
        ):
            return f"its manifest has a malformed entry {name!r}"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
        if _digest(path) != facts["sha256"]:
            return f"{name} has another sha256 than the manifest"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def newest_valid(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line about each newer one that was skipped."""
    skipped: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {fault}")
    return None, skipped


def prune(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; call only after a newer one is whole."""
    if limit is not None:
        for folder in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(folder)


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
    """Write checkpoint-N. Call on one process only, between barriers."""
    tensors: dict[str, Mapping[str, Tensor]] = {
        f"role_{role}": bank.role_state(role) for role in bank.roles if bank.members(role)
    }
    opt_tensors, opt_plain = optimizer_state(bank, optimizer)
    tensors["optimizer"] = opt_tensors
    if method_state:
        tensors["method"] = {k: v.detach().cpu().contiguous() for k, v in method_state.items()}
    write_folder(folder, tensors, {"trainer_state": dict(state), "optimizer": opt_plain})


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
    whole = folder if (folder / MANIFEST).is_file() else newest_valid(folder)[0]
    fault = "no whole checkpoint" if whole is None else fault_of(whole)
    if whole is None or fault is not None:
        raise ValueError(
            f"init_student_from: expected a run or checkpoint folder, got {folder} with {fault}."
        )
    averaged = whole / "role_ema.safetensors"
    return averaged if averaged.is_file() else whole / "role_student.safetensors"
