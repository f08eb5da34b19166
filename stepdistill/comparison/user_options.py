"""What the user of `stepdistill compare --teacher` said: the options, and the methods' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.config.method_names import resolve_method
from stepdistill.methods import METHODS
from stepdistill.storage.bundled import bundled_file
from stepdistill.storage.files import located, sha256_of

NOT_SETTLED = {"methods", "prompts_file"}  # more may come; what it says counts
LYING = ("teacher", "train_data_dir", "reference", "features")


@dataclass(frozen=True)
class UserOptions:
    """What the user said. methods: name -> config file, or None for the bundled one's; settings:
    laid over every method's file."""

    teacher: str
    prompts_file: str
    features: Sequence[str]
    train_data_dir: str | None = None
    reference: str | None = None
    methods: Mapping[str, str | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    student: str | None = None
    train_batch_size: int | None = None
    mixed_precision: str | None = None
    resolution: int | None = None
    num_pairs: int = 1024
    pair_steps: int = 25
    teacher_steps: Sequence[int] = (1, 2, 4, 8, 50)
    eval_options: Mapping[str, Any] = field(default_factory=dict)

    def settled(self) -> dict[str, Any]:
        """What must not change between calls in one folder: of the prompts what they say, of
        folders where they lie, however they were written."""
        options = {name: v for name, v in asdict(self).items() if name not in NOT_SETTLED}
        lying = {name: located(options[name]) for name in LYING}
        return {**options, **lying, "prompts": sha256_of(Path(self.prompts_file))}


def split_methods(texts: Sequence[str]) -> dict[str, str | None]:
    """NAME or NAME=FILE -> {name: file}. Errors: ValueError for a name without file or method."""
    files: dict[str, str | None] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not file and bundled(name) is None and not is_method(name):
            raise ValueError(
                f"methods: expected a method of {sorted(METHODS)}, a file of configs/methods or "
                f"NAME=FILE, got {text!r}."
            )
        files[name] = file or None
    return files


def is_method(name: str) -> bool:
    """Whether a method is called so, by us or by users."""
    try:
        return bool(resolve_method(name))
    except ValueError:
        return False


def bundled(name: str) -> Path | None:
    """The settings of that name in configs/methods."""
    settings_file = METHODS[name].settings_file if name in METHODS else ""
    return bundled_file(f"configs/methods/{settings_file or name}.yaml")
