"""Family: the adapter between one kind of stock Diffusers pipeline and every method.

A family turns prompts into a Cond and images into latents with the pipeline's own code, and calls
the pipeline's own denoiser. It knows nothing of methods, adapters or precision.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), N tokens, D width.

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.core.denoiser import linear_guidance
from stepdistill.core.method import Setting
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Cond
from stepdistill.families.end_input import with_end_input
from stepdistill.families.features import FeatureBlock
from stepdistill.families.schedule import dynamic_shift, own_sampler, read_schedule
from stepdistill.families.stock_call import StockCall


def net_dtype(net: nn.Module) -> torch.dtype:
    """The dtype a denoiser computes in: that of its first weight (adapters come after theirs)."""
    return next(p.dtype for p in net.parameters() if p.is_floating_point())


class Family(StockCall):
    """One kind of pipeline. Subclasses are at most 140 lines and list the classes they serve."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.path, self.kind, self._fixed_shift = read_schedule(pipeline.scheduler)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.eval()  # train mode would drop class labels (DiT) and activations at random
                if name not in self.net_parts:
                    part.requires_grad_(False)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the teacher itself is told the guidance (w) in place of a null pass."""
        return False

    def shift_at(
        self, height: int | None = None, width: int | None = None, num_steps: int = 50
    ) -> float:
        """Resolution shift of the stock call's times at that size (the model's own where None).

        Args: num_steps: of that call, where its shift depends on them (Flux.2's).
        """
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return self._fixed_shift * (self.sends_sigmas or 1.0)
        return dynamic_shift(config, self.image_tokens(height, width))

    def image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """What the stock call counts for a dynamic shift at that size."""
        sides = self.sample_shape(height, width)[1:]
        return math.prod(sides) // int(self.config.get("patch_size", 1)) ** len(sides)

    @property
    def shift(self) -> float:
        """`shift_at` the model's own size."""
        return self.shift_at()

    @property
    def setting(self) -> Setting:
        """The facts a method may know, at the model's own size."""
        return self.setting_at(None)

    def setting_at(self, resolution: int | None) -> Setting:
        """The same at that many px a side."""
        size, kind = (resolution, resolution), (self.path, self.sends_sigmas)
        usual = self.shift_at(*size)

        def sampler(num_steps: int, shift: float) -> SamplerSpec:
            # Of another shape's, in buckets, there is what the usual number of steps has.
            of_steps = self.shift_at(*size, num_steps) if shift == usual else shift
            return own_sampler(self.pipeline.scheduler, *kind, num_steps, of_steps)

        return Setting(self.path, self.kind, usual, sampler, self.owned)

    def copy_net(self, extra_inputs: Sequence[str] = (), net: nn.Module | None = None) -> nn.Module:
        """An independent copy of the denoiser with the extra inputs a role asks for.

        Args: net: what to copy; none means the teacher's own.
        Errors: ValueError where the stock class has no such input.
        """
        tells_end = tuple(extra_inputs) == ("s",) and self.supports_s
        if extra_inputs and not tells_end:
            raise ValueError(
                f"{self.name}: expected extra inputs the stock network has, got {extra_inputs}. "
                "Set embed_guidance: false."
            )
        twin = copy.deepcopy(self.net if net is None else net)
        return with_end_input(twin) if tells_end else twin

    def forward(
        self,
        net: nn.Module,
        x_t: Tensor,
        model_t: Tensor,
        cond: Cond,
        w: Tensor | None = None,
    ) -> Tensor:
        """The raw output (B, C, *S) of `net` at x_t (B, C, *S), told time model_t (B,).

        Errors: ValueError for w with a network that has no guidance embedding.
        """
        if not self.supports_w:
            self.refuse_w(w)
        return self.run(net, x_t, model_t, cond, w)

    @abstractmethod
    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """`forward` for the adapter to define; w is None where `supports_w` is false."""

    def from_raw(self, out: Tensor, x_t: Tensor, model_t: Tensor) -> Tensor:
        """What `forward` makes of the stock denoiser's output (B, C, *S) at x_t: here itself."""
        return out

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """The stock call's guided output (B, C, *S) of the two; guidance: a number or (B,)."""
        return linear_guidance(cond, null, guidance)

    def refuse_w(self, w: Tensor | None) -> None:
        """Errors: ValueError where w is given; for networks without that input."""
        if w is not None:
            raise ValueError(f"{self.name}: expected no w (no guidance embedding), got one.")

    @abstractmethod
    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """Blocks a head may read by name; "mid" is always one of them."""

    def num_calls(self, cond: Cond) -> int:
        """Calls of the network that `run` makes for that Cond."""
        return 1

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """Captured features without what else a block puts out beside the image (text, padding)."""
        return features
