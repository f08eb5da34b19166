"""checkpoint-N folders: written aside, manifest last, renamed whole; read back only if whole.

Everything is safetensors or JSON: weights of trained and averaged roles, optimiser state, the
method's buffers, the position in the data. Random numbers need no state (see core.context). Of
networks in shards each process writes its own (see shards.py); both kinds are read alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepdistill.loading.stored_tensors import StoredTensors
from stepdistill.monitoring.best import read_best
from stepdistill.reporting.bars import bar
from stepdistill.roles.role_weights import to_cpu
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.checkpoints import (
    clear_left,
    discard,
    is_checkpoint,
    is_users,
    list_checkpoints,
    newest_valid,
    order_of,
    step_of,
)
from stepdistill.storage.files import read_json
from stepdistill.storage.folders import MANIFEST, fault_of, write_folder
from stepdistill.storage.shards import write_shards
from stepdistill.training.optim import state_shape

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


def named_checkpoint(output_dir: Path, name: str) -> Path:
    """A run's whole checkpoint by name: "best" or checkpoint-N.

    Errors: ValueError where there is none of that name, or it is damaged.
    """
    best = read_best(output_dir)
    chosen = best.checkpoint if name == "best" and best is not None else name
    fault = fault_of(output_dir / chosen) if is_checkpoint(chosen) else "no such name"
    if fault is not None:
        raise ValueError(
            f'checkpoint: expected "best" (kept by best_metric) or a whole checkpoint-N of '
            f"{output_dir}, got {name!r}: {fault}."
        )
    return output_dir / chosen


def prune(newest: Path, limit: int | None, protect: Collection[str] = ()) -> None:
    """Delete what is older than the newest `limit` whole checkpoints up to `newest`.

    What a killed save or deletion left lying goes too, and the predecessors of whole checkpoints.
    The best (see best.py), the names in `protect` and what may be a user's stay, and do not count.

    Args: newest: the checkpoint just written, which is whole.
    Notes: damaged folders don't count towards the limit, and nothing newer is touched: a damaged
        checkpoint-100 must not push the good checkpoint-60 out. Sizes are compared, not hashes.
    """
    clear_left(newest.parent)
    if limit is None:
        return
    best = read_best(newest.parent)
    stays = {*protect, *([best.checkpoint] if best is not None else [])}
    older = [
        p
        for p in list_checkpoints(newest.parent)
        if order_of(p) < order_of(newest) and f"checkpoint-{step_of(p)}" not in stays
    ]
    complete = [p for p in older if fault_of(p, hashes=False) is None]
    staying = [*complete, newest][-limit:]
    for folder in older:
        if order_of(folder) < order_of(staying[0]) and not is_users(folder):
            discard(folder)


# ------------------------------------------------------------------ optimiser
def optimizer_state(bank: RoleBank, optimizer: Optimizer, role: str) -> dict[str, Tensor]:
    """The live tensors of a role's optimiser state by "role/parameter/key"."""
    return {k: v for k, v in _entries(bank, optimizer, role) if torch.is_tensor(v)}


def plain_state(bank: RoleBank, optimizer: Optimizer) -> dict[str, Any]:
    """What of the optimiser's state is no tensor, by "role/parameter/key"."""
    entries = [e for role in bank.trained_roles for e in _entries(bank, optimizer, role)]
    return {key: value for key, value in entries if not torch.is_tensor(value)}


def _entries(bank: RoleBank, optimizer: Optimizer, role: str) -> Iterator[tuple[str, Any]]:
    for name, param in bank.members(role).items():
        for key, value in optimizer.state.get(param, {}).items():
            yield f"{role}/{name}/{key}", value


def load_optimizer_state(
    bank: RoleBank, optimizer: Optimizer, tensors: StoredTensors | None, plain: Mapping[str, Any]
) -> None:
    """Put a saved state back, matched by role and parameter name; in shards where those are."""
    owners = {
        f"{role}/{name}": param
        for role in bank.trained_roles
        for name, param in bank.members(role).items()
    }

    def owner_of(full_key: str) -> tuple[Tensor, str]:
        owner, _, key = full_key.rpartition("/")
        if owner not in owners:
            raise ValueError(
                f"checkpoint: expected optimiser state of {sorted(owners)[:2]}..., "
                f"got {owner!r}. Was it saved with another tuning?"
            )
        return owners[owner], key

    values: dict[str, Any] = dict(plain)
    if tensors is not None:
        for full_key, (shape, dtype) in tensors.facts.items():
            param, key = owner_of(full_key)
            expected = state_shape(key, param)
            if shape and shape != expected:
                raise ValueError(
                    f"checkpoint: expected optimiser state {full_key} of {expected}, got {shape}."
                )
            cut = shape == tuple(param.shape)  # as the parameter is, if it is
            like = param.detach() if cut else torch.empty(shape, device=param.device)
            values[full_key] = torch.zeros_like(like, dtype=dtype)
        tensors.read_into({k: v for k, v in values.items() if k in tensors.facts})
    for full_key, value in values.items():
        param, key = owner_of(full_key)
        optimizer.state[param][key] = value


# ----------------------------------------------------------------- whole run
class _Parts(Mapping[str, Mapping[str, Tensor]]):
    """File stem -> tensors, made when looked up: only one file's are in memory at a time."""

    def __init__(self, makers: Mapping[str, Callable[[], Mapping[str, Tensor]]]) -> None:
        self._makers = makers

    def __getitem__(self, stem: str) -> Mapping[str, Tensor]:
        return self._makers[stem]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _copied(make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return to_cpu(make())


def save_checkpoint(
    folder: Path,
    bank: RoleBank,
    optimizer: Optimizer,
    method_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
    in_shards: bool = False,
    progress: bool = False,
) -> None:
    """Write checkpoint-N on one process, between barriers; networks in shards on all together.

    Args: progress: show a bar.
    Errors: OSError where it can't be written, naming the newest whole checkpoint.
    """
    makers: dict[str, Callable[[], Mapping[str, Tensor]]] = {
        f"role_{role}": partial(bank.stored, role) for role in bank.roles if bank.members(role)
    }
    for role in bank.trained_roles:
        makers[f"optimizer_{role}"] = partial(optimizer_state, bank, optimizer, role)
    if method_state:
        makers["method"] = lambda: method_state
    documents = {"trainer_state": dict(state), "optimizer": plain_state(bank, optimizer)}
    written = bar(total=len(makers), desc="checkpoint", leave=False, disable=not progress)

    def counted(make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        written.update()
        return make()

    makers = {stem: partial(counted, make) for stem, make in makers.items()}
    try:
        if in_shards:
            write_shards(folder, _Parts(makers), documents)
        else:
            copies = _Parts({stem: partial(_copied, make) for stem, make in makers.items()})
            write_folder(folder, copies, documents)
    except OSError as err:
        good, _ = newest_valid(folder.parent)
        raise OSError(
            f"{err} Newest whole checkpoint: {good.name if good else 'none yet'}; then go on with "
            "--resume_from_checkpoint latest."
        ) from err
    finally:
        written.close()


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
    """Load weights and optimiser in place, in shards or not; returns the method's saved buffers.

    A head that the bank has not (its pixel network is needed to train alone) is left out.
    """
    for role in bank.roles:
        if bank.members(role):
            bank.load_role_state(role, StoredTensors(folder / f"role_{role}"))
    plain = read_json(folder / "optimizer.json").items()
    held = {key: value for key, value in plain if key.partition("/")[0] in bank}
    load_optimizer_state(bank, optimizer, None, held)
    for source in _stored_as(folder, "optimizer"):
        role = source.name.removeprefix("optimizer_")
        if role in bank or source.name == "optimizer":  # earlier runs have one for all roles
            load_optimizer_state(bank, optimizer, StoredTensors(source), {})
    buffers: dict[str, Tensor] = {}
    for source in _stored_as(folder, "method"):
        stored = StoredTensors(source)
        buffers = {name: torch.empty(s, dtype=d) for name, (s, d) in stored.facts.items()}
        stored.read_into(buffers)
    return buffers


def _stored_as(folder: Path, begins: str) -> list[Path]:
    """What StoredTensors reads of the checkpoint under names that begin so."""
    files = [p for p in folder.glob(f"{begins}*") if p.is_dir() or p.suffix == ".safetensors"]
    return sorted({p.with_suffix("") for p in files})


def saved_student(source: str | Path) -> Path:
    """The averaged (else plain) student weights of a run's newest whole checkpoint, to be read by
    StoredTensors.

    Errors: ValueError where the folder is neither a whole checkpoint nor a run with one.
    """
    folder = Path(source)
    skipped: list[str] = []
    complete: Path | None = folder
    if not (folder / MANIFEST).is_file():
        complete, skipped = newest_valid(folder)
    for line in skipped:
        warnings.warn(f"init_student_from: {line}", stacklevel=3)
    fault = "no whole checkpoint" if complete is None else fault_of(complete)
    if complete is None or fault is not None:
        raise ValueError(
            f"init_student_from: expected a run or checkpoint folder, got {folder} with {fault}."
        )
    averaged = _stored_as(complete, "role_ema")
    return averaged[0] if averaged else complete / "role_student"
