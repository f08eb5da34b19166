"""(noise, x0, prompt) sets: a teacher's own trajectories, the data of reflow.

`generate_pairs` runs the teacher's guided ODE from numbered noises and writes shards; `PairDataset`
reads them. Pair i is keyed by seed + i, batches never cross a shard, and a shard is written under
a temporary name, then renamed: a resumed set equals an uninterrupted one bit for bit, and ranks may
share the work. The files are described in files.py.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), n pairs of a shard.

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepdistill.core.context import normal_rows, stable_seed
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.options import PairSolver
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.stopping import stop_if_orphaned
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.data.fingerprint import list_digest
from stepdistill.pairs.beside import RowsBeside, from_bytes
from stepdistill.pairs.files import (
    DTYPES,
    MANIFEST,
    ForeignShardError,
    PairSettings,
    damaged,
    digest,
    open_shard,
    read_manifest,
    shard_name,
)
from stepdistill.reporting.bars import bar
from stepdistill.reporting.values import counted
from stepdistill.storage.files import write_text
from stepdistill.storage.shard_files import BrokenShardError, Shard, write_shard

_MOST_TOLD = 1000
Prompt = str | int  # an int is a class label
# noise and x0 (n, C, *S), n prompts, and uint8 images beside them (n, ...) by their keys
Pairs = tuple[Tensor, Tensor, list[Prompt], dict[str, Tensor]]


class PairWriter:
    """Writes a pair set shard by shard; opening an unfinished one goes on where it stopped.

    Args: num_pairs: size of the whole set; an existing set may grow, never shrink. teacher: what
        model_hash is of (see teacher.py), to say what differs.
    Errors: ValueError where the folder holds pairs of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: PairSettings,
        num_pairs: int,
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        if num_pairs < 1:
            raise ValueError(f"pairs: expected num_pairs >= 1, got {num_pairs}.")
        self.folder, self.settings, self.num_pairs = Path(folder), settings, num_pairs
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            old, size = read_manifest(self.folder)
            if not old.model_hash:  # an earlier set, whose teacher is known by its name alone
                self.settings = settings = replace(settings, model_hash="")
            new_values, old_values = asdict(settings), asdict(old)
            changed = [key for key, value in old_values.items() if new_values[key] != value]
            if old.model_hash and "model_hash" not in changed:
                changed = [key for key in changed if key != "model"]  # it was moved
            if changed:
                changes = ", ".join(
                    f"{k} {old_values[k]!r}, now {new_values[k]!r}" for k in changed
                )
                raise ValueError(
                    f"pairs: expected the settings that {str(folder)!r} was made with, got another "
                    f"{changes}. Use a new folder, or the old settings to go on."
                )
            if size > num_pairs:
                raise ValueError(f"pairs: expected num_pairs >= {size} on disk, got {num_pairs}.")
        elif any(self.folder.glob("shard-*.safetensors")):
            raise ValueError(f"pairs: {str(folder)!r} holds shards but no {MANIFEST}. Empty it.")
        manifest = {"settings": asdict(settings), "num_pairs": num_pairs}
        manifest |= {"teacher": dict(teacher)} if teacher and settings.model_hash else {}
        text = json.dumps(manifest, indent=1) + "\n"
        write_text(self.folder / MANIFEST, text)  # all ranks at once

    @property
    def num_shards(self) -> int:
        return self.settings.num_shards(self.num_pairs)

    def rows(self, shard: int) -> range:
        """Pair numbers of that shard."""
        return self.settings.rows(shard, self.num_pairs)

    def done(self, shard: int) -> bool:
        """Whether the shard is on disk, bit for bit; if not, it is to be made (again).

        Errors: ForeignShardError where another set's shard would be overwritten.
        """
        try:
            open_shard(self.folder, self.settings, shard, self.rows(shard)).read()
        except ForeignShardError:
            raise
        except (ValueError, FileNotFoundError):
            return False
        return True

    def write(
        self,
        shard: int,
        noise: Tensor,
        x0: Tensor,
        prompts: Sequence[Prompt],
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write one whole shard: noise and x0 (n, C, *S), n prompts, and their images beside them.

        Errors: ValueError for wrong sizes, or an x0 that is not finite (it names the first pair).
        """
        rows, shape = self.rows(shard), (len(self.rows(shard)), *self.settings.shape)
        sizes = (tuple(noise.shape), tuple(x0.shape), len(prompts))
        if sizes != (shape, shape, len(rows)):
            expected = f"{counted(len(rows), 'pair')} of {shape[1:]}"
            raise ValueError(f"pairs: expected {expected}, got {sizes}.")
        finite = x0.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise ValueError(
                f"pairs: expected finite x0, got NaN or inf in pair {rows[bad]} "
                f"({prompts[bad]!r}). The teacher overflowed: use float32 or bfloat16."
            )
        tensors = {"noise": noise.float(), "x0": x0.to("cpu", DTYPES[self.settings.x0_dtype])}
        tensors |= beside or {}
        header = {
            "fingerprint": self.settings.fingerprint,
            "start": rows[0],
            "prompts": list(prompts),
        }
        write_shard(self.folder / shard_name(shard), tensors, header)


class PairDataset(Dataset[dict[str, Any]]):
    """A finished pair set: items {"prompt", "x0": (C, *S) float32, "noise": (C, *S) float32}; of
    states at a time above 0 {"prompt", "start": (C, *S) float32}. Of a model that reads images
    beside the prompt an item has these too, as its dataset's items have.

    Every shard's header is checked when the set is opened; pairs are read on demand, and compared
    with their hash then.
    Errors: ValueError for a missing manifest, missing shards, or a truncated, malformed, changed or
    foreign shard; it names the file and what to do.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings, self.num_pairs = read_manifest(self.folder)
        shards = range(self.settings.num_shards(self.num_pairs))
        absent = (n for n in map(shard_name, shards) if not (self.folder / n).is_file())
        missing = list(islice(absent, _MOST_TOLD))  # a manifest may state any number
        if missing:
            count = f"{_MOST_TOLD} or more" if len(missing) == _MOST_TOLD else len(missing)
            raise ValueError(
                f"pairs: expected {counted(len(shards), 'shard')} in {str(folder)!r}, got {count} "
                f"missing ({missing[0]} first). Run stepdistill pairs again with the same settings."
            )
        self._handles: dict[int, Shard] = {}
        for shard in shards:
            self._open(shard)
        self._handles.clear()  # a loader's workers open their own

    def _open(self, shard: int) -> Shard:
        if shard not in self._handles:
            rows = self.settings.rows(shard, self.num_pairs)
            self._handles[shard] = open_shard(self.folder, self.settings, shard, rows)
        return self._handles[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # open files do not pickle

    def fingerprint(self) -> str:
        """sha256 of the settings that made the pairs, and of their number."""
        return list_digest((self.settings.fingerprint, self.num_pairs))

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pairs: expected an index below {len(self)}, got {index}.")
        shard, row = divmod(index % len(self), self.settings.shard_size)
        opened = self._open(shard)
        try:
            pair = opened.row(row)
        except BrokenShardError as err:
            raise damaged(err) from err
        beside = from_bytes({name: pair.pop(name) for name, _ in self.settings.beside})
        latents = {name: value.float() for name, value in pair.items()}
        if self.settings.until:
            latents = {"start": latents["x0"]}
        return {"prompt": opened.facts["prompts"][row], **latents, **beside}


def pair_noise(seed: int, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, C, *S) float32 unit noise of the numbered pairs: row i from a CPU generator seed + i."""
    return normal_rows(tuple(shape), [seed + i for i in rows])


def generate_pairs(
    denoiser: Denoiser,
    encode: Callable[[Sequence[Any]], Cond],
    null: Callable[[int], Cond],
    prompts: Sequence[Prompt],
    folder: str | Path,
    num_pairs: int,
    *,
    shape: Sequence[int],
    model: str,
    teacher: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    times: tuple[float, ...] = uniform_grid(25),
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = 256,
    x0_dtype: Literal["float32", "bfloat16"] = "float32",
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    kind: Literal["ode", "renoise"] = "ode",
    solver: PairSolver = "ddim",
    until: float = 0.0,
    beside: RowsBeside | None = None,
) -> PairDataset | None:
    """Solve the teacher's guided ODE for num_pairs noises and write them; whole shards are kept.

    Source: Liu et al. 2023 (InstaFlow), arXiv:2309.06380, stage 1 (25 deterministic steps).
    Args:
        encode, null: Family.encode and Family.null, or the like. Pair i has prompt i modulo theirs.
        teacher: JSON by which the teacher is known wherever it lies; None: by `model` alone.
        shape: (C, *S) of one latent. times: descending, from t = 1 where x is the prior.
        solver: of the ODE, first order or second (SamplerSpec.multistep), a call a step.
        kind, until: of a student's own steps, with fresh noise between them, and where they stop.
        beside: the images that the prompts' rows have; then it encodes.
        rank, world_size: this process makes every world_size-th shard, from shard `rank`.
    Returns: the finished set; None where other ranks' shards are still missing.
    """
    if not len(prompts):
        raise ValueError("pairs: expected at least one prompt, got none.")
    settings = PairSettings(
        model=model,
        model_hash=digest(teacher) if teacher else "",
        times=tuple(times),
        guidance=guidance,
        seed=seed,
        shape=tuple(shape),
        prompts_hash=digest(list(prompts) if beside is None else beside.content),
        batch_size=batch_size,
        shard_size=shard_size,
        x0_dtype=x0_dtype,
        solver=solver if kind == "ode" else kind,
        until=until,
        beside=() if beside is None else beside.layout,
    )
    spec = SamplerSpec(settings.times, kind, multistep=settings.solver == "multistep")

    def solved(rows: Sequence[int]) -> Pairs:
        noise, texts = pair_noise(seed, rows, shape), [prompts[i % len(prompts)] for i in rows]

        def fresh(step: int) -> Tensor:
            seeds = [stable_seed("fresh", seed, i, step) for i in rows]
            return normal_rows(tuple(shape), seeds).to(device)

        images = {} if beside is None else beside.images(rows)
        conds = (encode(texts), null(len(rows))) if beside is None else beside.encode(texts, images)
        made = (denoiser, spec, noise.to(device), *conds, guidance, fresh)
        return noise, sample_x0(*made, until=until).cpu(), texts, images

    writer = PairWriter(folder, settings, num_pairs, teacher)
    return write_shards(writer, solved, rank, world_size, progress)


def write_shards(
    writer: PairWriter,
    make: Callable[[Sequence[int]], Pairs],
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> PairDataset | None:
    """Make and write the missing shards of this rank, `settings.batch_size` pairs at a time.

    Args: make: numbers of pairs -> their noise, x0 (n, C, *S), prompts and images, on the CPU.
    Returns: the finished set; None where other ranks' shards are still missing.
    """
    batch_size = writer.settings.batch_size
    mine = range(rank, writer.num_shards, world_size)
    total = sum(len(writer.rows(shard)) for shard in mine)
    with bar(total=total, desc="pairs", unit="pair", disable=not progress) as made:
        for shard in mine:
            stop_if_orphaned()
            rows = writer.rows(shard)
            if not writer.done(shard):
                starts = range(0, len(rows), batch_size)
                parts = [make(rows[start : start + batch_size]) for start in starts]
                noise, x0 = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
                texts = [text for part in parts for text in part[2]]
                images = {key: torch.cat([p[3][key] for p in parts]) for key in parts[0][3]}
                writer.write(shard, noise, x0, texts, images)
            made.update(len(rows))
    names = [shard_name(shard) for shard in range(writer.num_shards)]
    return PairDataset(writer.folder) if all((writer.folder / n).is_file() for n in names) else None
