"""From a collated dict to the Batch a method sees: prompts encoded, images turned into latents.

Prompt embeddings and latents come from the run's cache on disk where it has one; else the last used
are kept in memory, so that a dataset of few prompts or images is encoded once.
"""

# Shapes: B batch, C channels, *S spatial.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from stepdistill.cache.encoded import EncodedCache, image_key
from stepdistill.config.run import TrainConfig
from stepdistill.core.types import CONDITIONING, DRAWN_BY, EASIER, MASK, Batch, Cond
from stepdistill.families.beside import images_beside
from stepdistill.families.family import Family

REREAD = "reread"  # (row, raw batch, key of the item) -> the image that the source left out
_PIXELS_AT_ONCE = 2**20  # of images encoded in one call: what one of 1024 x 1024 px takes


class BatchMaker:
    """Turns raw batches into Batches with a family's own encoding code.

    Args: max_cached_prompts, latents_cache_bytes: how many, and how much, is kept in memory, least
        recently used dropped first; 0 keeps none. max_cached_latents: a limit of their number too.
        disk: the run's cache; what it has is not kept in memory.
    """

    def __init__(
        self,
        family: Family,
        device: torch.device,
        resolution: int | None = None,
        cache_latents: bool = True,
        max_cached_prompts: int = 4096,
        latents_cache_bytes: int = 2 << 30,
        max_cached_latents: int | None = None,
        disk: EncodedCache | None = None,
    ) -> None:
        self.family, self.device, self.disk = family, device, disk
        self.shape = family.sample_shape(resolution, resolution)
        self._max_prompts = max_cached_prompts
        self._latents_room = latents_cache_bytes if cache_latents and max_cached_latents != 0 else 0
        self._max_latents = max_cached_latents
        self._latents_size = 0  # bytes
        self._prompts: OrderedDict[Any, Cond] = OrderedDict()
        # By content, or source and row; and what a prompt's images make of its Cond.
        self._latents: OrderedDict[Any, Tensor | Cond] = OrderedDict()
        self._null: Cond | None = None

    @torch.no_grad()
    def __call__(
        self, raw: dict[str, Any], with_x0: bool = True, gan: dict[str, Any] | None = None
    ) -> Batch:
        """The Batch of a collated dict (see data.stream.collate); x0 None where not with_x0.

        Args: gan: the collated dict of the discriminator's own source.
        """
        cond, prompts = self._cond(raw)
        if self._null is None:
            self._null = self.family.null(1).to(self.device)
        null, easier = self.family.null_for(cond, self._null), None
        if EASIER in raw:
            other = self._cond({**raw, CONDITIONING: raw[EASIER], DRAWN_BY: raw[CONDITIONING]})[0]
            easier = (other, self.family.null_for(other, self._null))
        real, x0 = None, self._x0(raw) if with_x0 else None
        if gan is not None:
            x0_gan = self._x0(gan, "gan")
            assert x0_gan is not None, "the trainer checks what the source has"
            real = (x0_gan, self._cond(gan)[0])
        rejected = self._rejected(raw) if with_x0 else None
        known = {"index", "content", "prompt", "label", "image", "x0", "noise", "size", REREAD}
        known |= {"rejected", "rejected_content", CONDITIONING, EASIER, MASK}
        return Batch(
            cond=cond,
            null=null,
            shape=self._shape(raw) if x0 is None else tuple(x0.shape[1:]),
            x0=x0,
            noise=raw["noise"].to(self.device).float() if "noise" in raw else None,
            prompts=tuple(prompts) if "prompt" in raw else None,
            extra={
                key: value.to(self.device) if isinstance(value, Tensor) else value
                for key, value in raw.items()
                if key not in known
            }
            | ({} if rejected is None else {"rejected": rejected}),
            gan=real,
            easier=easier,
        )

    def _shape(self, raw: dict[str, Any]) -> tuple[int, ...]:
        """(C, *S) of samples that begin from noise: of the bucket, where there is one, or run."""
        if "size" not in raw:
            return self.shape
        (size,) = set(raw["size"])
        return self.family.sample_shape(*size)

    def _cond(self, raw: dict[str, Any]) -> tuple[Cond, list[Any]]:
        """The Cond of a collated dict, and what it was told by: prompts, labels or nothing."""
        prompts: list[Any]
        if self.family.conditioning == "none":
            prompts = [0] * len(raw["index"])
        else:
            prompts = raw["label"] if "label" in raw else raw["prompt"]
        prompts = [p.item() if isinstance(p, Tensor) else p for p in prompts]
        cond, images = self.encode(prompts), images_beside(self.family, raw)
        if "images" in self.family.call_draws and DRAWN_BY in raw:
            images[DRAWN_BY] = raw[DRAWN_BY]
        if self.family.reads:
            cond = self._with_images(cond, prompts, images, self._shape(raw))
        return cond, prompts

    def _with_images(
        self, cond: Cond, prompts: Sequence[Any], images: dict[str, Any], shape: tuple[int, ...]
    ) -> Cond:
        """The Cond with its rows' images; only prompts with new ones are encoded, as latents are
        kept."""
        if not self._latents_room or not all(isinstance(x, Tensor) for x in images.values()):
            return self.family.with_images(cond, images, shape).to(self.device)
        rows = []
        for row, prompt in enumerate(prompts):
            beside = {name: image[row : row + 1] for name, image in images.items()}
            key = (prompt, shape, *((n, image_key({"image": x})) for n, x in beside.items()))
            made = self._kept(key)
            if made is None:  # one by one, as prompts are
                made = self.family.with_images(cond.slice(row, row + 1), beside, shape)
                self._keep(key, made)
            assert isinstance(made, Cond)
            rows.append(made.to(self.device))
        return Cond.cat(rows)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """What the prompts alone decide of the Cond, on the run's device; only new ones are
        encoded."""
        if self.disk is None and not self._max_prompts:  # all are new wherever a run was resumed
            return self.family.encode_text(prompts).to(self.device)
        fresh: dict[Any, Cond] = {}
        stored: dict[Any, Cond] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt in self._prompts:
                self._prompts.move_to_end(prompt)
                continue
            cached = None if self.disk is None else self.disk.prompt(prompt)
            if cached is not None:
                stored[prompt] = cached.to(self.device)
            else:
                # One by one: the last bits depend on the batch a prompt is encoded in, and which
                # prompts are new depends on where a run was resumed.
                fresh[prompt] = self.family.encode_text([prompt]).to(self.device)
        at_hand = {**stored, **fresh}
        parts = [at_hand[p] if p in at_hand else self._prompts[p] for p in prompts]
        if self._max_prompts:
            self._prompts.update(fresh)
            _drop_oldest(self._prompts, self._max_prompts)
        return Cond.cat(parts)

    def _rejected(self, raw: dict[str, Any]) -> Tensor | None:
        """(B, C, *S) latents of the images that x0 was chosen over; of a kind with x0."""
        if not {"rejected", "rejected_content"} & raw.keys():
            return None
        if "x0" in raw:
            latents: Tensor = raw["rejected"].to(self.device).float()
            return latents
        names = {"index": "index", "image": "rejected", "content": "rejected_content"}
        pair = {name: raw[key] for name, key in names.items() if key in raw}
        if REREAD in raw:
            pair[REREAD] = lambda row, _, __: raw[REREAD](row, raw, "rejected")
        return self._x0(pair, "rejected")

    def _x0(self, raw: dict[str, Any], source: str = "") -> Tensor | None:
        """(B, C, *S) latents. Args: source: of several, whose rows these are."""
        if "x0" in raw:
            latents: Tensor = raw["x0"].to(self.device).float()
            return latents
        if not {"image", "content"} & raw.keys() or self.family.from_first_frame():
            return None  # of the latter the image is the first frame alone
        images: Any = raw["image"] if "image" in raw else [None] * len(raw["index"])
        uncached = not self._latents_room and (self.disk is None or self.disk.latents is None)
        if uncached and isinstance(images, Tensor):
            at_once = max(1, _PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
            made = [self.family.latents(some).float() for some in images.split(at_once)]
            return torch.cat(made).to(self.device)
        parts = []
        for row, image in enumerate(images):
            content = raw["content"][row] if "content" in raw else None
            key = (source, raw["index"][row]) if content is None else content
            latent = self._latent(key, content, image)
            if latent is None and REREAD in raw:
                latent = self._latent(key, content, raw[REREAD](row, raw, "image"))
            if latent is None:
                raise ValueError(
                    f"cache_dir: expected the latent of {key!r}, got a shard that was broken and "
                    "is deleted. Start again with --resume_from_checkpoint latest: it is made anew."
                )
            parts.append(latent.to(self.device))
        return torch.stack(parts)

    def _latent(self, key: Any, content: str | None, image: Tensor | None) -> Tensor | None:
        """(C, *S) of an image (3, H, W), which may be missing where the disk has its latent; None
        where both are."""
        if self.disk is not None and self.disk.latents is not None:
            key_facts = {"image": image} if content is None else {"content": content}
            stored = self.disk.latent(image_key(key_facts))
            if stored is not None:
                return stored
        remembered = self._kept(key)
        if isinstance(remembered, Tensor):
            return remembered
        if image is None:  # a source leaves out what the disk had when the run began
            return None
        fresh = self.family.latents(image.unsqueeze(0))[0].float()  # one by one, where the VAE is
        if self._latents_room:
            self._keep(key, fresh)
        return fresh

    def _kept(self, key: Any) -> Tensor | Cond | None:
        if key not in self._latents:
            return None
        self._latents.move_to_end(key)
        return self._latents[key]

    def _keep(self, key: Any, value: Tensor | Cond) -> None:
        """In the host's memory: of what was just encoded, which waits for the device anyway."""
        self._latents[key] = value.to("cpu")
        self._latents_size += _nbytes(value)
        limit = len(self._latents) if self._max_latents is None else self._max_latents
        while self._latents_size > self._latents_room or len(self._latents) > limit:
            self._latents_size -= _nbytes(self._latents.popitem(last=False)[1])

    @property
    def latents_kept(self) -> int:
        """How many latents of the run's own shape, in float32, stay in memory."""
        many = self._latents_room // (4 * prod(self.shape))
        return many if self._max_latents is None else min(many, self._max_latents)


def _nbytes(value: Tensor | Cond) -> int:
    tensors = value.tensors.values() if isinstance(value, Cond) else (value,)
    return sum(tensor.nbytes for tensor in tensors)


def _drop_oldest(entries: OrderedDict[Any, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)


def batch_maker(
    family: Family, device: torch.device, args: TrainConfig, training: bool
) -> BatchMaker:
    """The BatchMaker of a run; its cache on disk is opened for training alone."""
    disk = None
    if args.cache_dir is not None and training:
        disk = EncodedCache(args.cache_dir, family, args.resolution)
    sizes = (args.max_cached_prompts, args.latents_cache_mb << 20, args.max_cached_latents)
    return BatchMaker(family, device, args.resolution, args.cache_latents, *sizes, disk)
