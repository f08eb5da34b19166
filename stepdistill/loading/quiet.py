"""What libraries say in a run that needs nobody's attention: each by its message, with the reason.

Nothing else of theirs is hidden. Our own warnings are printed as one line each.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# (logger, or "" for a Python warning; start of the message as a regular expression). Why it is
# no news: above each.
QUIET = (
    # Diffusers, casting a denoiser that names no module to keep: the list is empty.
    ("diffusers.models.modeling_utils", r"There are modules in \w+ that .* in float32: \[\]"),
    # Diffusers, of a teacher's scheduler: its table alone is read, and an export's says 1.
    ("", r"(?s)The configuration file of this scheduler: .* is outdated. `steps_offset`"),
    # PyTorch, of AutoencoderOobleck, which Diffusers builds so.
    ("", r"`torch.nn.utils.weight_norm` is deprecated"),
    # Diffusers, reading back a LoRA of the denoiser alone, which is all that is trained.
    ("diffusers.loaders.peft", r"No LoRA keys associated to \w+ found with the prefix="),
    ("diffusers.loaders.lora_base", r"No LoRA keys associated to \w+ found with the prefix="),
)


@contextmanager
def without_warnings(level: int = logging.WARNING) -> Iterator[None]:
    """Within: no logger of any library warns, or says anything else up to that level."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().lstrip()
        return not any(re.match(start, text) for name, start in QUIET if name == record.name)


_known = _Known()


def quieten() -> None:
    """For a command's process: hide QUIET, and print warnings of ours without a line of source."""
    for name, start in QUIET:
        if name:
            logging.getLogger(name).addFilter(_known)  # one filter counts once
        else:
            warnings.filterwarnings("ignore", message=start)
    plain = warnings.formatwarning
    ours = str(Path(__file__).parents[1])

    def one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if filename.startswith(ours) or "pydantic" in Path(filename).parts:  # calls our validators
            return f"warning: {message}\n"
        return plain(message, category, filename, lineno, line)

    if plain.__module__ == "warnings":  # not again
        warnings.formatwarning = one_line


@contextmanager
def without_bars(*libraries: str) -> Iterator[None]:
    """Within: bars of diffusers or transformers, which stand below another and part it, are not
    drawn."""
    said = [import_module(f"{library}.utils.logging") for library in libraries]
    drawing = [one for one in said if one.is_progress_bar_enabled()]
    for one in drawing:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in drawing:
            one.enable_progress_bar()
