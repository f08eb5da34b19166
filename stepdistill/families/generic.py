"""A family for text-to-image pipelines that have none, learnt by listening to the stock call.

At loading, the pipeline runs two unguided steps and a guided one (probe.py): which arguments of its
denoiser belong to a prompt, the time it is told, the use of its output, the null rows. What does
not fit is refused; `stepdistill check` judges the rest. No features, so no discriminator.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from stepdistill.core.types import Cond
from stepdistill.families import probe
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock
from stepdistill.families.schedule import shift_of_mu

NAME = "generic"  # of no entry in FAMILIES: it serves what no family does
BINNING = "use_resolution_binning"  # of sizes that were released; ours are exact


class GenericFamily(Family):
    """Any pipeline whose latents (B, C, H, W) reach its denoiser as they are, or packed 2 x 2."""

    name: ClassVar[str] = NAME
    pipelines: ClassVar[tuple[str, ...]] = ()
    one_size: ClassVar[bool] = True  # each is listened to, and its rows may tell it

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._call = inspect.signature(type(pipeline).__call__).parameters
        self._inputs = inspect.signature(self.net.forward).parameters
        self._image = probe.image_input(self.net, self._inputs)
        self._own_shape: tuple[int, ...] = ()
        self._listen(*[probe.side_px(self) if {"height", "width"} <= set(self._call) else None] * 2)
        self._own_shape = self.facts.shape
        modules = {n for n, m in self.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        ends = [t for t in type(self).lora_targets if any(n.endswith("." + t) for n in modules)]
        self.lora_targets = tuple(ends)  # type: ignore[misc]

    def _listen(self, height: int | None, width: int | None) -> None:
        """Learn the call at that size in px (the call's own default where None)."""
        self._size = {"height": height, "width": width} if height and width else {}
        self.facts = probe.learn(self)
        self._null = Cond(probe.learn_null(self, self.facts.rows))

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        facts, dtype = self.facts, net_dtype(net)
        time = (facts.slope * model_t + facts.offset).float()
        inputs = {self._image: self.pack(x_t.to(dtype)), "timestep": time}
        fixed = {name: probe.placed(value, x_t.device) for name, value in facts.fixed.items()}
        out: Any = net(**inputs, **probe.joined(cond.to(dtype=dtype).tensors, fixed))
        made = self.unpack(out[0] if isinstance(out, tuple) else out.sample, x_t.shape)
        return made[:, : x_t.shape[1]]  # learned variances are dropped

    def pack(self, latents: Tensor) -> Tensor:
        return self.facts.pack(latents)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return self.facts.unpack(packed, shape)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """None: where image tokens stand in a block can't be heard."""
        return {}

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, H, W). Another size than the last is listened to anew: rows may tell it."""
        if height and width and {"height": height, "width": width} != self._size:
            self._listen(height, width)
        return self.facts.shape

    @property
    def default_shape(self) -> tuple[int, ...]:
        return self._own_shape

    def shift_at(
        self, height: int | None = None, width: int | None = None, num_steps: int = 50
    ) -> float:
        """See Family.shift_at: what the stock call was heard to tell its scheduler."""
        if self._own_shape:  # else asked for while the first call is listened to
            self.sample_shape(height, width)
        mu, config = self.facts.mu if self._own_shape else None, self.pipeline.scheduler.config
        if mu is None or not config.get("use_dynamic_shifting"):  # which else is not read
            return self._fixed_shift
        return shift_of_mu(config, mu)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """What the stock call tells its denoiser of B prompts, stopped before the denoiser runs."""
        heard = probe.hear(self, check_prompts(prompts), 1.0, 1, encode=True)
        return Cond(probe.pick(heard.rest[0], self.facts.rows))

    def null(self, bsz: int) -> Cond:
        return self._null.repeat(bsz)

    @property
    def call_extras(self) -> dict[str, Any]:
        no_bins = {BINNING: False} if BINNING in self._call else {}
        return {**self._size, **no_bins}


def generic_family(pipeline_class: str) -> type[GenericFamily]:
    """The generic family of a Diffusers text-to-image pipeline class, from its signatures.

    Errors: ValueError where the class is none of Diffusers or not of that kind.
    """
    cls: Any = getattr(diffusers, pipeline_class, None)
    is_pipeline = isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)
    parts = set(inspect.signature(cls.__init__).parameters) if is_pipeline else set()
    nets = [name for name in ("transformer", "unet") if name in parts]
    call = set(inspect.signature(cls.__call__).parameters) if parts else set()
    wanted = {"prompt", "guidance_scale", "num_inference_steps", "generator", "output_type"}
    if len(nets) != 1 or not {"vae", "scheduler"} <= parts or not wanted <= call or "image" in call:
        raise ValueError(
            f"generic: expected a Diffusers pipeline from text with one transformer or unet, a vae "
            f"and guidance_scale, got {pipeline_class!r}."
        )
    source = inspect.getsource(cls.__call__)
    uncommented = "\n".join(line.split("#")[0] for line in source.splitlines())
    options = {
        "net_name": nets[0],
        "pipelines": (pipeline_class,),
        "scales_input": "scale_model_input" in uncommented,
        "sends_sigmas": float("np.linspace(1.0, 1 / num_inference_steps" in uncommented),
    }
    return type(GenericFamily.__name__, (GenericFamily,), options)
