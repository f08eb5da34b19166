"""EDM-type pixel UNets in a ConsistencyModelPipeline: preconditioning around unet2d's network.

The equations stand in unet2d.py. A consistency model is no teacher: its output is a sample, not the
mean of x0 given x_t; the pipeline class is taken as a container of an EDM-trained network.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.core.path import VEPath, expand
from stepdistill.core.types import Cond
from stepdistill.families.unet2d import UNet2DFamily


class EDMFamily(UNet2DFamily):
    """ConsistencyModelPipeline; a prompt is a class id where the UNet has classes."""

    name: ClassVar[str] = "edm"
    pipelines: ClassVar[tuple[str, ...]] = ("ConsistencyModelPipeline",)
    tiny = "stepdistill.testing.tiny_pixels:tiny_edm"
    variants = {"edm_plain": {"classes": None, "restarts": False}}
    conditioning: Literal["prompt", "label", "none"] = "label"
    scales_input: ClassVar[bool] = True

    def __init__(self, pipeline: Any) -> None:
        self.conditioning = self.conditioning_in(pipeline.unet.config)
        super().__init__(pipeline)

    @classmethod
    def conditioning_in(cls, config: Any) -> Literal["prompt", "label", "none"]:
        return "none" if config.get("num_class_embeds") is None else "label"

    @classmethod
    def labels_in(cls, config: Any) -> int | None:
        return config.get("num_class_embeds")  # type: ignore[no-any-return]

    def _sigma(self, model_t: Tensor) -> Tensor:
        path = self.path
        assert isinstance(path, VEPath)
        return (model_t.double() / path.time_scale).exp().clamp_max(path.sigma_max)

    def scale_input(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        """c_in x_t (B, C, H, W)."""
        data = self.pipeline.scheduler.config.sigma_data
        return x_t * expand((self._sigma(model_t) ** 2 + data**2).rsqrt(), x_t)

    def from_raw(self, out: Tensor, x_t: Tensor, model_t: Tensor) -> Tensor:
        """D (B, C, H, W) = c_skip x_t + c_out F, in float32 or better."""
        config, sigma = self.pipeline.scheduler.config, self._sigma(model_t)
        data = config.sigma_data
        sign = -1.0 if config.get("prediction_type") == "v_prediction" else 1.0
        total = sigma**2 + data**2
        x_t = x_t if x_t.dtype == torch.float64 else x_t.float()
        skip = expand(data**2 / total, x_t) * x_t
        return skip + expand(sign * sigma * data * total.rsqrt(), x_t) * out.to(x_t.dtype)

    def encode(self, prompts: Sequence[Any]) -> Cond:
        """class_labels (B,) int64, or rows without content where the UNet has no classes.

        Errors: ValueError for a label that is no id 0..K-1.
        """
        if self.conditioning == "none":
            return super().encode(prompts)
        count = self.config.num_class_embeds
        for label in prompts:
            if not isinstance(label, Integral) or not 0 <= int(label) < count:
                raise ValueError(f"edm: expected a class id 0..{count - 1}, got {label!r}.")
        return Cond(
            {"class_labels": torch.tensor(list(prompts), device=self.pipeline.unet.device).long()}
        )
