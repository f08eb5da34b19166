"""What must not leave the machine: keys and tokens of any kind, and the machine's own paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, ValuesView
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from stepdistill.reporting.markdown import plain

# Forms as their issuers document them. They are looked for in text, headers and metadata alone.
SECRETS: dict[str, re.Pattern[bytes]] = {
    "Hugging Face token": re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "OpenAI or Anthropic key": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,})"),
    "AWS key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "Google key": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}"),
    "Slack token": re.compile(rb"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "Azure storage key": re.compile(rb"AccountKey=[A-Za-z0-9+/]{40,}"),
    "private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "password in a URL": re.compile(rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@"),
}
# Environment variables that hold one, of the trackers and stores that a run may use.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
_SHORTEST = 8  # a value shorter than that would be found by chance


def secret_in(data: bytes) -> str | None:
    """The kind of the first secret in these bytes: by its form, or one this process knows."""
    for kind, form in SECRETS.items():
        if form.search(data):
            return kind
    secrets = [get_token() or "", *(os.environ.get(name, "") for name in _VARIABLES)]
    if any(len(value) >= _SHORTEST and value.encode() in data for value in secrets):
        return "token of this machine"
    return None


def is_local_path(text: str) -> bool:
    """Whether a value names a place on this machine: absolute, or a relative path that is there."""
    if not text or len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    if re.match(r"[/\\~]|\.\.?[/\\]|[A-Za-z]:[/\\]", text):
        return True
    return "/" in text and Path(text).exists()


def local_paths(value: Any) -> set[str]:
    """Every local path among the strings of a JSON value."""
    if isinstance(value, str):
        return {value} if is_local_path(value) else set()
    inner = value.values() if isinstance(value, Mapping) else value
    return set().union(*map(local_paths, inner)) if isinstance(inner, _MANY) else set()


_MANY = (list, tuple, ValuesView)


def named_alone(value: Any) -> Any:
    """The same JSON value with each local path cut to its last name."""
    if isinstance(value, str):
        return last_name(value) if is_local_path(value) else value
    if isinstance(value, Mapping):
        return {key: named_alone(inner) for key, inner in value.items()}
    return [named_alone(inner) for inner in value] if isinstance(value, list | tuple) else value


def last_name(path: str) -> str:
    """The last part of a path of either system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "local"


def without_paths(text: str, paths: set[str]) -> str:
    """The text with these paths, and what they are from the root on, cut to their last names."""
    plain_forms = ((path, form) for path in paths for form in (path, os.path.abspath(path)))
    spelt = {form: last_name(path) for path, raw in plain_forms for form in (raw, plain(raw))}
    for form in sorted(spelt, key=len, reverse=True):
        text = text.replace(form, spelt[form])
    return text


def published_json(file: Path) -> bytes:
    """A JSON file without local paths: its own bytes where it has none."""
    raw = file.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return raw  # it will be looked through for secrets; nothing in it is a value of ours
    return (json.dumps(named_alone(value), indent=2) + "\n").encode() if local_paths(value) else raw


def header_of(file: Path) -> bytes:
    """The JSON header of a safetensors file, metadata and all."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return opened.read(min(size, file.stat().st_size))


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} where its header can't be read."""
    try:
        metadata = json.loads(header_of(file)).get("__metadata__") or {}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in metadata.items()}
