"""Compare our adapter with the stock pipeline, and LoRA files; status 1 where they differ."""

from __future__ import annotations

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Model
from stepdistill.config.tuning import Quantization


class Options(CommandOptions):
    model_dir: CliPositionalArg[Model]
    """Diffusers pipeline folder or Hub id."""
    base_quantization: Quantization = "none"
    """Compare with the denoiser's linear layers in 8 bits (int8) or 4 (nf4, on CUDA)."""


def run(options: Options) -> int:
    from stepdistill.export.lora import lora_rows
    from stepdistill.testing.parity import print_check

    return print_check(options.model_dir, options.base_quantization, (lora_rows,))
