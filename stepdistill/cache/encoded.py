"""The run's cache of encoded prompts and latents on disk: what encoded them, and reading it.

Keys are content alone; folders are named by the encoder that made them: a hash of its weights in
their dtype, its configuration and tokenizers, the family and the resolution. A fine-tuned or merged
text encoder, or another autoencoder, has a folder of its own, whatever its path says.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.cache.tensors import TensorCache, content_key
from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.storage.files import read_json, write_text

_FORMAT = 1  # raise it where a family's encoding changes


def image_key(item: dict[str, Any]) -> bytes:
    """The key of an item's image: its file's hash where the source tells it, else its pixels'."""
    if "content" in item:
        return content_key(item["content"])
    pixels: Tensor = item["image"].contiguous()
    return content_key([list(pixels.shape), hashlib.sha256(pixels.numpy().tobytes()).hexdigest()])


def _part_digest(part: Any) -> str:
    """A hash of a network's weights and configuration, or of a tokenizer's files."""
    sha = hashlib.sha256(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        config = getattr(part, "config", None)
        settings = (
            {} if config is None else dict(config if isinstance(config, dict) else config.to_dict())
        )
        for key in ("_name_or_path", "_diffusers_version", "transformers_version"):
            settings.pop(key, None)
        sha.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, value in sorted(part.state_dict().items()):
            sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    else:
        with tempfile.TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                sha.update(path.name.encode() + _settled(path))
    return sha.hexdigest()


def _settled(path: Path) -> bytes:
    """A tokenizer's file without what its last call left in it."""
    if path.name != "tokenizer.json":
        return path.read_bytes()
    config = json.loads(path.read_text(encoding="utf-8"))
    lasting = {key: value for key, value in config.items() if key not in ("truncation", "padding")}
    return json.dumps(lasting, sort_keys=True).encode()


def encoder_facts(family: Family, resolution: int | None, latents: bool) -> dict[str, Any]:
    """What prompts (or images) are encoded with: parts by name and hash, family, resolution."""
    parts = {
        name: _part_digest(part)
        for name, part in sorted(family.pipeline.components.items())
        if part is not None
        and name not in (*family.net_parts, *family.side_nets)
        and name not in ("scheduler", "safety_checker", "feature_extractor")
        and (name == "vae") == latents
        and (isinstance(part, nn.Module) or "tokenizer" in name or "processor" in name)
    }
    return {
        "format": _FORMAT,
        "family": family.name,
        "pipeline": type(family.pipeline).__name__,
        "resolution": resolution,
        "parts": parts,
    }


class EncodedCache:
    """Both caches of a run, under CACHE_DIR/prompts-HASH and CACHE_DIR/latents-HASH.

    prompts: None for models told a label or nothing. latents: None for pixel models, and where the
    image is a first frame.
    """

    def __init__(self, folder: str | Path, family: Family, resolution: int | None) -> None:
        self.folder, self.family, self.resolution = Path(folder), family, resolution
        self.prompts: TensorCache | None = None
        self.latents: TensorCache | None = None
        if family.conditioning == "prompt":
            self.prompts = self._open("prompts")
        if "vae" in family.pipeline.components and not family.from_first_frame():
            self.latents = self._open("latents")

    def _open(self, kind: str) -> TensorCache:
        facts = encoder_facts(self.family, self.resolution, kind == "latents")
        text = json.dumps(facts, sort_keys=True, indent=1)
        folder = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "encoder.json").is_file():
            write_text(folder / "encoder.json", text)
        return TensorCache(folder, self._latents_fit if kind == "latents" else bool)

    def _latents_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        channels, *sides = self.family.default_shape
        shape = shapes.get("x0", ())
        return set(shapes) == {"x0"} and (shape[:1], len(shape)) == ((channels,), 1 + len(sides))

    def _stores(self) -> list[TensorCache]:
        return [store for store in (self.prompts, self.latents) if store is not None]

    @staticmethod
    def _mark(store: TensorCache, facts: Mapping[str, Any]) -> Path:
        text = json.dumps(dict(facts), sort_keys=True)
        return store.folder / f"seen-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def seen(self, facts: Mapping[str, Any]) -> bool:
        """Whether a dataset of these facts was encoded whole and no row was lost since."""
        marks = [(store, self._mark(store, facts)) for store in self._stores()]
        return facts["sha256"] is not None and all(
            mark.is_file() and read_json(mark, ("rows",))["rows"] <= len(store)
            for store, mark in marks
        )

    def note(self, facts: Mapping[str, Any]) -> None:
        """Note that a dataset was encoded whole."""
        for store in self._stores() if facts["sha256"] is not None else ():
            text = json.dumps({"rows": len(store), **facts}, indent=1)
            write_text(self._mark(store, facts), text)

    def reopen(self) -> None:
        """See what other processes wrote."""
        if self.prompts is not None:
            self.prompts = TensorCache(self.prompts.folder, self.prompts.fits)
        if self.latents is not None:
            self.latents = TensorCache(self.latents.folder, self.latents.fits)

    def prompt(self, prompt: Any) -> Cond | None:
        """The Cond of one prompt, on the CPU, or None where it is missing."""
        tensors = self.prompts.get(content_key(prompt)) if self.prompts is not None else None
        return None if tensors is None else Cond({k: v.unsqueeze(0) for k, v in tensors.items()})

    def latent(self, key: bytes) -> Tensor | None:
        """The latent (C, *S) of an image's key, or None where it is missing."""
        tensors = self.latents.get(key) if self.latents is not None else None
        return None if tensors is None else tensors["x0"]
