"""Where an export comes from: the base's Hub id, its exact weights and its licence.

Read from the base's own files (a local folder or the Hub's cache), asked of the Hub where it can be
reached, and left None where neither says: nothing is guessed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download

from stepdistill.loading.identity import SNAPSHOT, UNREACHABLE, commit_of
from stepdistill.storage.files import sha256_of


@dataclass(frozen=True)
class BaseModel:
    """hub_id: "user/name" or None for local files. commit: of the Hub's repository.
    sha256: of the local weights. licence: the base card's metadata, by Hub field name; {} unknown.
    """

    hub_id: str | None
    commit: str | None
    sha256: str | None
    licence: dict[str, str]


def base_model(model: str | None, revision: str | None = None) -> BaseModel:
    """The facts of a teacher: local folder or file, a folder of the Hub cache, or a Hub id."""
    if not model:
        return BaseModel(None, None, None, {})
    path = Path(model)
    if path.exists():
        cached = SNAPSHOT.search(path.absolute().as_posix())
        hub_id = f"{cached[1]}/{cached[2]}" if cached else None
        card = path / "README.md"
        licence = _licence(card) if card.is_file() else {}
        commit = cached[3] if cached else None
        return BaseModel(hub_id, commit, None if commit else weights_sha256(path), licence)
    return BaseModel(model, commit_of(model, revision), None, _hub_licence(model, revision))


def weights_sha256(path: Path) -> str | None:
    """One hash over the safetensors files of a folder (names and contents), or of one file."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _licence(card: Path) -> dict[str, str]:
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # no readable metadata
        return {}
    fields = ("license", "license_name", "license_link")
    return {name: str(data[name]) for name in fields if data.get(name)}


def _hub_licence(model: str, revision: str | None) -> dict[str, str]:
    try:
        return _licence(Path(hf_hub_download(model, "README.md", revision=revision)))
    except UNREACHABLE:
        return {}
