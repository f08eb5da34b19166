"""Publish an export: private by default, safetensors and text only, no secret and no local path.

`payload` is the one list of what is sent; a dry run writes the same bytes into a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from stepdistill.export.hub_card import published_card
from stepdistill.export.secrets import (
    header_of,
    is_local_path,
    local_paths,
    metadata_of,
    named_alone,
    published_json,
    secret_in,
    without_paths,
)
from stepdistill.loading.project_code import is_project_code
from stepdistill.storage.files import EXPORT_RECORD as RECORD

SENT = {".safetensors", ".json", ".md", ".txt", ".png", ".jinja", ".model", ".yaml"}
_TEXT = SENT - {".safetensors", ".png", ".model"}
_CONFIGS = re.compile(r"(.*/)?(model_index|config|[\w-]+_config)\.json")  # vocabularies are data
_MALFORMED = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    RecursionError,
    KeyError,
    TypeError,
    AttributeError,
)
# Left out of the record: they say where the run lay, not what it was.
_PATHS = ("output_dir", "resume_from_checkpoint", "init_student_from")


def files_to_push(folder: str | Path) -> list[str]:
    """Relative paths that a push would upload; hidden files and folders are never among them.

    Errors: ValueError for pickled or unknown files, links out of the folder, or no export.
    """
    root = Path(folder)
    if not (root / RECORD).is_file():
        raise ValueError(
            f"push: expected an exported folder with {RECORD}, got {root}. "
            "Make one: stepdistill export RUN_DIR OUT."
        )
    found = sorted(p for p in root.rglob("*") if p.is_file() and not _is_hidden(p, root))
    outside = [p for p in found if root.resolve() not in p.resolve().parents]
    if outside:
        raise ValueError(f"push: expected files inside {root}, got the link {outside[0]}.")
    sent = (p.suffix.lower() in SENT or is_project_code(p) for p in found)
    odd = [p.relative_to(root).as_posix() for p, ok in zip(found, sent, strict=True) if not ok]
    if odd:
        raise ValueError(
            f"push: expected safetensors and text only, got {odd[:3]}. Export into a new folder."
        )
    return [p.relative_to(root).as_posix() for p in found]


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def payload(folder: str | Path, repo_id: str) -> dict[str, bytes | Path]:
    """What a push sends, path in the repository -> contents, or the file that holds them.

    Errors: see files_to_push; ValueError for a broken record, a malformed repo_id, or a token in a
        file.
    """
    root = Path(folder)
    try:
        validate_repo_id(repo_id)
    except ValueError as err:
        raise ValueError(f"push: expected a repository user/name, got {repo_id!r}. {err}") from err
    sent: dict[str, bytes | Path] = {name: root / name for name in files_to_push(root)}
    try:
        record: dict[str, Any] = json.loads((root / RECORD).read_text(encoding="utf-8"))
        card = published_card(root, record, repo_id)
    except _MALFORMED as err:
        raise ValueError(f"{root / RECORD}: expected an export's record, got {err!r}.") from err
    for name in _PATHS:
        record["run"].get("train_config", {}).pop(name, None)
    sent["README.md"] = without_paths(card, local_paths(record)).encode()
    sent[RECORD] = (json.dumps(named_alone(record), indent=2) + "\n").encode()
    for name, content in sent.items():
        if isinstance(content, Path) and _CONFIGS.fullmatch(name):
            sent[name] = published_json(content)
    refuse_secrets(sent)
    return sent


def refuse_secrets(sent: Mapping[str, bytes | Path]) -> None:
    """Errors: ValueError where a text, or the header of a weight file, holds a secret, or a weight
    file's metadata a local path. The line names the file and the kind alone."""
    for name, content in sent.items():
        kind = Path(name).suffix.lower()
        data = b""
        if kind == ".safetensors" and isinstance(content, Path):
            data = header_of(content)
            if any(map(is_local_path, metadata_of(content).values())):
                raise ValueError(
                    f"push: expected no path of this machine in any file, got one in the metadata "
                    f"of {name}. Save that file without it."
                )
        elif kind in _TEXT:
            data = content.read_bytes() if isinstance(content, Path) else content
        found = secret_in(data)
        if found is not None:
            raise ValueError(
                f"push: expected no secret in any file, got one in {name} ({found}). Remove it "
                "there, and revoke it where others could read it."
            )


def dry_run(folder: str | Path, repo_id: str, out_dir: str | Path) -> list[Path]:
    """Write into out_dir, byte for byte, what a push would upload; returns the files.

    Errors: ValueError where out_dir is not empty; see payload.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"push: expected an empty folder for the dry run, got {out}.")
    written = []
    for name, content in payload(folder, repo_id).items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        written.append(target)
    return written


def _first_line(err: BaseException | None) -> str:
    lines = "" if err is None else str(err).strip()
    return lines.splitlines()[0] if lines else ""


def push_folder(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload an export to `repo_id` in one commit; returns the repository's URL.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN).
    Args: private: visibility where the repository does not exist yet.
    Errors: see payload; ValueError where the Hub or its store of large files refuses.
    """
    sent = payload(folder, repo_id)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in sent.items()
    ]
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Add stepdistill export")
    except HfHubHTTPError as err:
        raise ValueError(
            f"push: expected the Hub to take {repo_id}, got: {_first_line(err)} "
            "Log in with `hf auth login` and check the name."
        ) from err
    except (RuntimeError, OSError, ValueError) as err:  # the store of large files, the network
        raise ValueError(
            f"push: expected the Hub to take {repo_id}, got: {_first_line(err)} "
            f"{_first_line(err.__cause__)} No commit was made: push again."
        ) from err
    return str(url)
