"""Which of two experts (high or low noise) a LoRA file is for: its header says so, or its name.

Nothing in the keys does: a file of either loads into the other without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

EXPERT = "expert"  # header of a file: high_noise or low_noise
# Names that users know: high_noise_model, wan2.2_..._low_noise_lora_rank64, ..._HIGH_fp16.
_NAMED = re.compile(r"(?i:(high|low)[_-]?noise)|(?<![A-Za-z])(HIGH|LOW)(?![A-Za-z])")


def expert_of(file: Path) -> str | None:
    """ "high", "low", or None where neither the header nor the name of a file says so."""
    said = ""
    if file.suffix == ".safetensors" and file.is_file():
        try:
            with safe_open(file, framework="pt") as opened:
                said = (opened.metadata() or {}).get(EXPERT, "")
        except SafetensorError:
            return None  # the loader says what is wrong with it
    match = _NAMED.search(said) or _NAMED.search(file.name)
    return (match[1] or match[2]).lower() if match else None


def refuse_half_pair(files: Sequence[Path], where: str) -> None:
    """Errors: ValueError where the LoRA files of a model with two experts leave one of them out, or
    do not say which they are for."""
    said = {file.name: expert_of(file) for file in files}
    unsaid = [name for name, expert in said.items() if expert is None]
    got = ", ".join(f"{name} ({expert or 'neither'})" for name, expert in said.items())
    if unsaid or set(said.values()) != {"high", "low"}:
        raise ValueError(
            f"{where}: expected LoRAs of both experts, each with high_noise or low_noise in its "
            f"header or name, got {got}. Give the file that is missing, or train one expert a run: "
            "--expert high, and low in a run of its own."
        )


def refuse_other_expert(file: Path, expert: str, where: str) -> None:
    """Errors: ValueError where the file says that it is for the other expert."""
    said = expert_of(file)
    if said is not None and said != expert:
        raise ValueError(
            f"{where}: expected a LoRA of the {expert}-noise expert, got {file.name}, which says "
            f"it is for {said} noise. Are the two files swapped?"
        )
