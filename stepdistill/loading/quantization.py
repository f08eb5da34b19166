"""Quantised frozen bases: a denoiser's linear layers in 8 or 4 bits, by Diffusers' own loader.

int8  torchao: one scale a row, weights alone; on CPU and CUDA.
nf4   bitsandbytes: blocks of 64 normal floats, their scales quantised again, as in QLoRA
      (Dettmers et al. 2023, arXiv:2305.14314); Diffusers loads it on a GPU alone.

Adapters stand beside such layers and stay float32. Nothing is ever merged into quantised weights:
an export merges into the weights that they were made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PACKAGE = {"int8": "torchao", "nf4": "bitsandbytes"}
BLOCK = 64  # weights of one nf4 scale
WHERE = "tuning.base_quantization"


def check_quantization(kind: str) -> None:
    """Errors: ValueError where the package is missing, or the machine can't load that kind."""
    if kind == "none":
        return
    if find_spec(PACKAGE[kind]) is None:
        raise ValueError(
            f"{WHERE}: expected {PACKAGE[kind]} for {kind!r}, got none. "
            f'pip install "stepdistill[quantization]"'
        )
    if kind == "nf4" and not torch.cuda.is_available():
        raise ValueError(
            f"{WHERE}: expected a CUDA device for 'nf4' (Diffusers loads bitsandbytes weights on a "
            "GPU alone), got none. Use int8."
        )


def loader_config(kind: str, dtype: torch.dtype) -> Any:
    """The quantization_config that Diffusers' from_pretrained takes.

    Args: dtype: what activations and all other weights are in.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def requantized(net: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """A loaded denoiser, quantised by way of a temporary folder as large as its weights."""
    with TemporaryDirectory() as folder:
        net.to(dtype).save_pretrained(folder)
        config, cls = loader_config(kind, dtype), type(net)
        made: nn.Module = cls.from_pretrained(folder, quantization_config=config, dtype=dtype)
        return made


def is_quantized(net: Any) -> bool:
    """Whether a stock denoiser was loaded with a quantization_config of any kind."""
    return net.config.get("quantization_config") is not None


def check_base(net: Any, kind: str, full: Sequence[str]) -> None:
    """Errors: ValueError where a loaded base is not quantised as told, or a role copies it."""
    if kind != "none" and not is_quantized(net):
        raise ValueError(
            f"{WHERE}: expected a base loaded so, got a plain {type(net).__name__}. "
            f"Load it with load_family(..., base_quantization={kind!r})."
        )
    if full and is_quantized(net):
        raise ValueError(
            f"tuning: expected LoRA roles on a quantised base (its weights can't be trained), got "
            f"full {full[0]}. Set --tuning.{full[0]} lora, or use a teacher in full precision."
        )


def is_packed(param: nn.Parameter) -> bool:
    """Whether a parameter holds quantised numbers, which no cast may touch."""
    return not param.is_floating_point() or is_traceable_wrapper_subclass(param.data)
