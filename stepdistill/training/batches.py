"""From a collated dict to the Batch a method sees: prompts encoded, images turned into latents.

Prompt embeddings and latents are kept in memory after the first use: a dataset of few prompts or
images is encoded once.
"""

# Shapes: B batch, C channels, *S spatial.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.types import Batch, Cond
from stepdistill.models.family import Family


class BatchMaker:
    """Turns raw batches into Batches with a family's own encoding code.

    Args: max_cached_prompts: embeddings kept, least recently used dropped first; 0 keeps none.
    """

    def __init__(
        self,
        family: Family,
        device: torch.device,
        resolution: int | None = None,
        cache_latents: bool = True,
        max_cached_prompts: int = 4096,
    ) -> None:
        self.family, self.device, self.cache_latents = family, device, cache_latents
        self.shape = family.sample_shape(resolution, resolution)
        self._max_prompts = max_cached_prompts
        self._prompts: OrderedDict[Any, Cond] = OrderedDict()
        self._latents: dict[int, Tensor] = {}
        self._null: Cond | None = None

    @torch.no_grad()
    def __call__(self, raw: dict[str, Any]) -> Batch:
        """The Batch of a collated dict (see data.stream.collate)."""
        prompts: list[Any]
        if self.family.conditioning == "none":
            prompts = [0] * len(raw["index"])
        else:
            prompts = raw["label"] if "label" in raw else raw["prompt"]
        prompts = [p.item() if isinstance(p, Tensor) else p for p in prompts]
        cond = self.encode(prompts)
        if self.family.reads_image:
            cond = self.family.with_image(cond, raw["image"], self.shape)
            null = self.family.null_for(cond)
        else:
            if self._null is None:
                self._null = self.family.null(1).to(self.device)
            null = self._null.repeat(cond.bsz)
        known = {"index", "prompt", "label", "image", "x0", "noise"}
        return Batch(
            cond=cond,
            null=null,
            shape=self.shape,
            x0=self._x0(raw),
            noise=raw["noise"].to(self.device).float() if "noise" in raw else None,
            prompts=tuple(prompts) if "prompt" in raw else None,
            extra={
                key: value.to(self.device) if isinstance(value, Tensor) else value
                for key, value in raw.items()
                if key not in known
            },
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """The Cond of the prompts on the run's device, encoding only the new ones."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        fresh: dict[Any, Cond] = {}
        for prompt in missing:
            # One by one: the last bits depend on the batch a prompt is encoded in, and which
            # prompts are new depends on where a run was resumed.
            fresh[prompt] = self.family.encode([prompt]).to(self.device)
        parts = []
        for prompt in prompts:
            if prompt in self._prompts:
                self._prompts.move_to_end(prompt)
            parts.append(fresh[prompt] if prompt in fresh else self._prompts[prompt])
        if self._max_prompts:
            self._prompts.update(fresh)
            while len(self._prompts) > self._max_prompts:
                self._prompts.popitem(last=False)
        return Cond.cat(parts)

    def _x0(self, raw: dict[str, Any]) -> Tensor | None:
        if "x0" in raw:
            latents: Tensor = raw["x0"].to(self.device).float()
            return latents
        if "image" not in raw or self.family.reads_image:  # there it is the first frame alone
            return None
        index: list[int] = raw["index"]
        fresh: dict[int, Tensor] = {}
        for i, key in enumerate(index):
            if key not in self._latents and key not in fresh:  # one by one, as for prompts
                image = raw["image"][i : i + 1].to(self.device)
                fresh[key] = self.family.latents(image)[0].float()
        if self.cache_latents:
            self._latents.update({key: value.cpu() for key, value in fresh.items()})
        parts = [fresh[k] if k in fresh else self._latents[k].to(self.device) for k in index]
        return torch.stack(parts)
