"""What tells one model from another whatever its path, in milliseconds for gigabytes.

A path says where a model lies, not what it is: weights are replaced in place, folders are moved.
Of each file that a loader would read, the identity has one hash: of a safetensors file the size,
the header (names, shapes, types) and bytes from the middle of every tensor; of a configuration its
values; of any other file its size, head and tail. Of a Hub id it is the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from stepdistill.loading.place import is_hub_id
from stepdistill.storage.files import read_json

Identity = dict[str, str]  # file within the model -> hash, or {"commit": of the Hub}

WHOLE_BYTES = 1 << 20  # files up to this size are hashed whole
SAMPLE_BYTES = 64  # of each tensor
MAX_HEADER = 100 << 20  # bytes; safetensors' own limit

SNAPSHOT = re.compile(r"models--(.+?)--(.+?)/snapshots/([0-9a-f]{40})")
UNREACHABLE = (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError)
# Parts that no sample depends on, and what a saver notes of itself.
_UNREAD = ("safety_checker", "feature_extractor", "image_processor")
_NOTES = ("_diffusers_version", "_name_or_path", "_commit_hash", "transformers_version")
_VARIANT = re.compile(r"[^.]+?(-\d{5}-of-\d{5})?(\.(?P<name>.+?)(-\d{5}-of-\d{5})?)?\.safetensors")


def identity_of(place: str, revision: str | None = None, variant: str | None = None) -> Identity:
    """Of a pipeline folder, a folder of one part, one file, or a Hub id ({} where the Hub can't
    say). Args: variant: the weight files that count (fp16), where a part has them."""
    path = Path(place)
    if path.is_file():
        return {"": file_hash(path)}
    if path.is_dir():
        return {p.relative_to(path).as_posix(): file_hash(p) for p in _read_files(path, variant)}
    commit = commit_of(place, revision) if is_hub_id(place) else None
    return {"commit": commit} if commit else {}


def _read_files(folder: Path, variant: str | None) -> Iterator[Path]:
    """The files of a pipeline (or part) that loaders read, in order."""
    index = folder / "model_index.json"
    parts = [folder]
    if index.is_file():
        yield index
        entries = read_json(index).items()
        parts = sorted(
            folder / name
            for name, entry in entries
            if isinstance(entry, list) and None not in entry and name not in _UNREAD
        )
    for part in parts:
        files = sorted(p for p in part.glob("*") if p.is_file())
        weights = [p for p in files if p.suffix == ".safetensors"]
        chosen = [p for p in weights if variant and _variant(p) == variant]
        yield from chosen or [p for p in weights if _variant(p) is None]
        if index.is_file():
            yield from (p for p in files if p.suffix in (".json", ".txt", ".model"))
        else:
            yield from (p for p in files if p.name.endswith("config.json"))


def _variant(file: Path) -> str | None:
    match = _VARIANT.fullmatch(file.name)
    return match["name"] if match else None


def file_hash(path: Path) -> str:
    """16 hex digits of a file's content, see above. Errors: OSError where it can't be read."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        values = _values(path) if path.suffix == ".json" else None
        if values is not None:
            return _hex(json.dumps(values, sort_keys=True).encode())
        return _hex(path.read_bytes())
    with path.open("rb", buffering=0) as file:
        read = file.fileno()
        sha = hashlib.sha256(f"{size}|".encode())
        for start, count in _samples(read, size, path.suffix == ".safetensors"):
            sha.update(os.pread(read, count, start))
    return sha.hexdigest()[:16]


def _hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _values(path: Path) -> Any:
    """Of a configuration, without a saver's notes; None for what is none."""
    try:
        values = read_json(path)
    except ValueError:
        return None  # the loader will say so
    return {name: value for name, value in values.items() if name not in _NOTES}


def _samples(fd: int, size: int, safetensors: bool) -> Iterator[tuple[int, int]]:
    """(start, bytes) of what is hashed of a large file."""
    header = int.from_bytes(os.pread(fd, 8, 0), "little") if safetensors else 0
    if not 0 < header <= min(MAX_HEADER, size - 8):
        half = WHOLE_BYTES // 2
        yield from ((0, half), (size - half, half))
        return
    yield 0, 8 + header
    try:
        facts = json.loads(os.pread(fd, header, 8))
        spans = [f["data_offsets"] for name, f in facts.items() if name != "__metadata__"]
        for start, end in sorted((int(a), int(b)) for a, b in spans):
            count = min(SAMPLE_BYTES, end - start)
            yield 8 + header + (start + end - count) // 2, count
    except (ValueError, TypeError, KeyError, AttributeError):  # no header: the loader will say so
        return


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit of a Hub id's cached files, which training reads, else what the Hub says now."""
    for name in ("model_index.json", "config.json", "adapter_config.json"):
        try:
            file = hf_hub_download(model, name, revision=revision, local_files_only=True)
        except (*UNREACHABLE, HFValidationError):
            continue
        match = SNAPSHOT.search(Path(file).as_posix())
        if match:
            return match[3]
    try:
        return HfApi().model_info(model, revision=revision).sha
    except (*UNREACHABLE, HFValidationError):
        return None


def differing(was: Mapping[str, str], now: Mapping[str, str]) -> list[str] | None:
    """Names of the files that differ between two identities; None where they can't be compared (a
    Hub's commit against files, or one that is not known)."""
    if not was or not now or ("commit" in was) != ("commit" in now):
        return None
    return sorted(name for name in {**was, **now} if was.get(name) != now.get(name))
