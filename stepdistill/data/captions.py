"""What is told beside an image: a caption, several of which one is drawn, or a class label.

Every source brings here what it read, so that one rule holds for all of them.
"""

from __future__ import annotations

import json
import reprlib
from numbers import Integral
from typing import Any

from stepdistill.core.context import stable_seed

Caption = str | tuple[str, ...]

LONGEST = 1 << 20  # bytes of a caption's file
MOST_LABELS = 2**31 - 1


def shown(value: object) -> str:
    """A value in a message: in short, however long or deep it is."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def caption_of(value: object) -> Caption:
    """The caption in a value, without space around it; of a list all of its captions.

    Errors: ValueError with the rule and the value: null, a number, blank, a lone surrogate.
    """
    if isinstance(value, list | tuple) and value:
        return tuple(_text(one) for one in value)
    return _text(value)


def _text(value: object) -> str:
    text = value.strip() if isinstance(value, str) else ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = ""  # half a character, as JSON can hold one
    if not text:
        raise ValueError(
            f"expected a caption (valid text that is not blank) or a list of them, got "
            f"{shown(value)}"
        )
    return text


def label_of(value: object, num_labels: int | None = None) -> int:
    """The class label in a number, or in a text of digits.

    Args: num_labels: of the model; None where it is not known.
    Errors: ValueError with the rule and the value.
    """
    text = value.strip() if isinstance(value, str) else ""
    if isinstance(value, Integral) and not isinstance(value, bool):
        label = int(value)
    else:
        label = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    most = MOST_LABELS if num_labels is None else num_labels - 1
    if not 0 <= label <= most:
        raise ValueError(f"expected a class label, 0 to {most}, got {shown(value)}")
    return label


def read_json(text: str) -> Any:
    """The value of a JSON text. Errors: ValueError, also where it is too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError as err:
        raise ValueError("JSON that is nested too deep") from err


def all_captions(captions: Any) -> tuple[Any, ...]:
    """Every caption that may be drawn of an item's prompt."""
    return tuple(captions) if isinstance(captions, list | tuple) else (captions,)


def one_caption(item: dict[str, Any], seed: int, position: int) -> dict[str, Any]:
    """The item with one of its captions: drawn from (seed, position), so that every epoch draws
    anew and a resumed run draws alike.

    Errors: ValueError for a prompt that is neither text nor a label, nor a list of texts.
    """
    prompt = item.get("prompt", "")
    if isinstance(prompt, str | Integral) and not isinstance(prompt, bool):
        return item
    try:
        texts = caption_of(prompt)
    except ValueError as err:
        raise ValueError(f"train_dataset: {err}, the prompt of an item. Correct it.") from err
    return {**item, "prompt": texts[stable_seed("caption", seed, position) % len(texts)]}
