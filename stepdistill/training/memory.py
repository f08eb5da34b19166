"""How a run is made to fit and to run fast: quantised bases, checkpointing, compiled blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepdistill.training.config import TrainConfig
from stepdistill.training.step import frozen_dtype

AUTO_PARAMETERS = 500_000_000  # "auto" recomputes activations from this size of the denoiser on


def quantized_base(args: TrainConfig) -> dict[str, Any]:
    """The options of load_family that quantise the denoiser; none where the run does not."""
    kind = args.tuning.base_quantization
    return {} if kind == "none" else {"base_quantization": kind, "base_dtype": frozen_dtype(args)}


def checkpoints_activations(args: TrainConfig, net: nn.Module) -> bool:
    """Whether the run recomputes activations: as told, or by the frozen denoiser's size."""
    if isinstance(args.gradient_checkpointing, bool):
        return args.gradient_checkpointing
    own = (p.numel() for name, p in net.named_parameters() if ".lora_" not in name)
    return sum(own) >= AUTO_PARAMETERS
