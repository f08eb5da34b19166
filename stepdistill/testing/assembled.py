"""Tiny pipelines put together from configurations: what `Family.tiny` holds. See tiny.py.

Apart from it, so that a family may use this while it is imported itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers

from stepdistill.testing.tiny_parts import TEXT_WIDTH, clip, ddim, gemma, qwen, seeded, t5, vae

TEXT: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "clip": clip,
    "clip_77": partial(clip, max_tokens=77),
    "t5": t5,
    "gemma": gemma,
    "qwen": qwen,
}
PARTS: dict[str, Callable[..., Any]] = {"AutoencoderKL": vae, "DDIMScheduler": ddim}


def assemble(pipeline: str, parts: Mapping[str, Any], seed: int = 0) -> Any:
    """A pipeline of that Diffusers class from parts made in their order, under the seed.

    parts: name -> a kind in TEXT, which makes text encoder and tokenizer; or a configuration with
    its _class_name, of tiny_parts' own options where PARTS has the class; or the part itself.
    """
    made: dict[str, Any] = {}
    with seeded(seed):
        for name, part in parts.items():
            if isinstance(part, str):
                made[name.replace("text_encoder", "tokenizer")], made[name] = TEXT[part](TEXT_WIDTH)
            elif isinstance(part, Mapping):
                options = dict(part)
                kind = options.pop("_class_name")
                made[name] = PARTS.get(kind, getattr(diffusers, kind))(**options)
            else:
                made[name] = part
        return getattr(diffusers, pipeline)(**made)
