"""Files of a pair set: manifest.json (what made it) and shard-00000.safetensors, ...

A shard holds noise (n, C, *S) float32, the unit noise the solver began from, and x0 (n, C, *S),
its scaled latents, perhaps images beside them (see beside.py); in its header its prompts, its first
pair and the manifest's fingerprint. All of it travels in one file (see storage/shard_files.py), so
nothing can slip against anything else.
"""

# Shapes: C channels, *S spatial or (F, H, W), n pairs of a shard.

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stepdistill.core.types import CONDITIONING, MASK
from stepdistill.storage.shard_files import BrokenShardError, Shard

MANIFEST = "manifest.json"
AGAIN = "Run stepdistill pairs again with the same settings: it makes this shard anew."
FORMAT = 1
IMAGE_KEYS = ("image", CONDITIONING, MASK)  # of an item
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ForeignShardError(ValueError):
    """A shard of another set lies in the folder: never overwritten, never read."""


def digest(value: object) -> str:
    """16 hex digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PairSettings:
    """What made a pair set: everything its tensors depend on.

    model, model_hash: id of the teacher, and a hash of what it is ("" where unknown) by which it
                       is known wherever it lies.
    solver, times:     deterministic solver and its descending times in (0, 1]; after the last, x0.
    guidance:          g of null + g (cond - null), baked into x0.
    seed:              pair i starts from noise of seed + i.
    shape:             (C, *S) of one sample. space: scaling convention of x0.
    prompts_hash:      digest of the prompt list; pair i has prompt i modulo its length.
    until:             time where the solver stops: above 0 x0 is the state there (a high-noise
                       expert's, see `stepdistill pairs`).
    beside:            (key in an item, shape) of the images that the model reads beside the prompt,
                       eight bits a channel in the shards.
    batch_size:        network batch, kept because last bits of a network depend on it.
    """

    model: str
    model_hash: str
    times: tuple[float, ...]
    guidance: float
    seed: int
    shape: tuple[int, ...]
    prompts_hash: str
    batch_size: int
    shard_size: int
    x0_dtype: Literal["float32", "bfloat16"] = "float32"
    solver: str = "ddim"
    until: float = 0.0
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()
    space: str = "scaled latents, as the denoiser sees them"
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_size < 1:
            raise ValueError(
                f"pairs: expected batch_size and shard_size >= 1, got {self.batch_size} and "
                f"{self.shard_size}."
            )
        if self.format != FORMAT:
            raise ValueError(f"pairs manifest.json: expected format {FORMAT}, got {self.format}.")
        if self.x0_dtype not in DTYPES:
            raise ValueError(
                f"pairs: expected x0_dtype in {sorted(DTYPES)}, got {self.x0_dtype!r}."
            )

    @property
    def fingerprint(self) -> str:
        settings = asdict(self)
        for later in ("until", "beside"):  # as in sets made before there were any
            if not settings[later]:
                del settings[later]
        if self.model_hash:
            del settings["model"]
        return digest(settings)

    def num_shards(self, num_pairs: int) -> int:
        return -(-num_pairs // self.shard_size)

    def rows(self, shard: int, num_pairs: int) -> range:
        """Pair numbers of a shard in a set of num_pairs."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, num_pairs))

    @staticmethod
    def parse(raw: dict[str, Any], where: Path) -> PairSettings:
        """Settings of a manifest. Errors: ValueError for missing or unknown keys, or values of
        another type."""
        try:
            lists = {key: tuple(raw[key]) for key in ("times", "shape")}
            for key in ("batch_size", "shard_size", "seed"):
                if type(raw[key]) is not int:
                    raise TypeError(f"{key} {raw[key]!r}")
            if not all(type(side) is int and side > 0 for side in lists["shape"]):
                raise TypeError(f"shape {raw['shape']!r}")
            if not all(type(t) in (int, float) and 0.0 < t <= 1.0 for t in lists["times"]):
                raise TypeError(f"times {str(raw['times'])[:100]}")
            if not 0.0 <= float(raw.get("until", 0.0)) < 1.0:
                raise TypeError(f"until {raw['until']!r}")
            beside = tuple((str(key), tuple(shape)) for key, shape in raw.get("beside", ()))
            for key, shape in beside:
                if key not in IMAGE_KEYS or not all(type(s) is int and s > 0 for s in shape):
                    raise TypeError(f"beside {key!r} of {shape}")
            return PairSettings(**{**raw, **lists, "beside": beside})
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{where}: expected the settings of a pair set, got {err}.") from err


def read_manifest(folder: Path) -> tuple[PairSettings, int]:
    """(settings, num_pairs) of a folder. Errors: ValueError for a missing or broken manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"pairs: expected {MANIFEST} in {str(folder)!r}, found none. "
            "Make pairs first: stepdistill pairs."
        )
    try:
        raw = json.loads(path.read_text())
        count = raw["num_pairs"]
        if type(count) is not int or count < 1:
            raise TypeError(f"num_pairs {count!r}")
        return PairSettings.parse(raw["settings"], path), count
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as err:
        raise ValueError(f"{path}: expected a pair manifest, got {err!r}. Make it anew.") from err


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def open_shard(folder: Path, settings: PairSettings, shard: int, rows: range) -> Shard:
    """One shard, its layout and header checked against the manifest.

    Errors: FileNotFoundError; ValueError for a truncated or malformed shard; ForeignShardError.
    """
    path = folder / shard_name(shard)
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        opened = Shard(path)
    except BrokenShardError as err:
        raise damaged(err) from err
    header = opened.facts if isinstance(opened.facts, dict) else {}
    if header.get("fingerprint") != settings.fingerprint:
        raise ForeignShardError(
            f"{path}: expected a shard of the set in {MANIFEST}, got one of other settings. "
            "Two sets were mixed in one folder; make them apart."
        )
    beside = dict(settings.beside)
    expected = dict.fromkeys(("noise", "x0"), settings.shape) | beside
    shapes = {name: shape for name, (_, shape) in opened.layout.items()}
    kinds = {dtype for name, (dtype, _) in opened.layout.items() if name not in beside}
    bytes_alone = all(opened.layout[name][0] == "U8" for name in beside.keys() & shapes.keys())
    prompts = header.get("prompts")
    complete = (
        isinstance(prompts, list)
        and all(type(p) in (str, int) for p in prompts)
        and len(opened) == len(prompts) == len(rows)
    )
    if (
        shapes != expected
        or not (kinds <= {"F32", "BF16"} and bytes_alone)
        or not complete
        or header.get("start") != rows[0]
    ):
        raise ValueError(
            f"{path}: expected pairs {rows[0]}..{rows[-1]} of shape {settings.shape}, got "
            f"{len(opened)} from {header.get('start')} of {opened.layout}. {AGAIN}"
        )
    return opened


def damaged(err: BrokenShardError) -> ValueError:
    """What a reader of the set is told of a broken shard."""
    return ValueError(f"{err}. {AGAIN}")
