"""Where a model lies: a folder, one file or a Hub id, told apart before anything is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stepdistill.storage.files import PICKLED

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILE_OF_HUB_ID = re.compile(rf"{HUB_ID.pattern}(/[\w./-]+\.safetensors)?")


def absolute(place: str) -> str:
    """The absolute path of what is there; any other text (a Hub id) as it is."""
    path = os.path.expanduser(place)
    return os.path.abspath(path) if place and os.path.exists(path) else place


def is_hub_id(text: str) -> bool:
    """Whether it is user/name: no other text is ever looked up on the Hub."""
    return HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def require_there(option: str, where: str) -> None:
    """Errors: ValueError where no file or folder is."""
    if not Path(absolute(where)).exists():
        raise ValueError(f"{option}: expected a file or folder, got {where!r}, which is not there.")


def check_lora(option: str, text: str) -> None:
    """Errors: ValueError where `text`, or what comes before its :scale, is not there and is no Hub
    id, nor a file of one."""
    path = text if Path(absolute(text)).exists() else text.rpartition(":")[0] or text
    of_hub = FILE_OF_HUB_ID.fullmatch(path) and not path.startswith(".")
    if not Path(absolute(path)).exists() and not of_hub:
        raise ValueError(
            f"{option}: expected a .safetensors file, a folder or a Hub id (user/name), got "
            f"{path!r}, which is not there."
        )


def check_model(option: str, where: str) -> None:
    """Errors: ValueError for what is neither a pipeline folder, nor a weight file, nor a Hub id."""
    if not is_single_file(where):
        check_place(where, option)


def check_place(where: str, option: str = "pretrained_model_name_or_path") -> None:
    """Errors: ValueError for what is neither a pipeline folder nor a Hub id."""
    path = Path(absolute(where))
    if not path.exists() and not is_hub_id(where):
        raise ValueError(
            f"{option}: expected a pipeline folder or a Hub id "
            f"(user/name), got {where!r}, which is not there."
        )
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{option}: expected a Diffusers pipeline folder "
            f"(with model_index.json), got {where!r}. Save it with save_pretrained."
        )


def is_single_file(model: str | Path) -> bool:
    """Whether `model` is one local weight file. Errors: ValueError for a pickled one."""
    path = Path(model)
    if path.is_file() and path.suffix in PICKLED:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a .safetensors file, got {path}. Pickled "
            "weights are not read; convert them with safetensors."
        )
    if path.suffix == ".safetensors" and not path.is_file():
        raise ValueError(
            f"pretrained_model_name_or_path: expected a local .safetensors file, got {path}, "
            "which is not there. Download it first."
        )
    return path.suffix == ".safetensors"
