"""How a run is made to fit and to run fast: quantised bases, checkpointing, compiled blocks."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stepdistill.config.run import TrainConfig
from stepdistill.families.family import Family
from stepdistill.families.vae import is_video_vae
from stepdistill.loading.source import ModelSource
from stepdistill.roles.checkpointing import checkpoint_blocks, checkpointed_blocks, no_contexts
from stepdistill.roles.rolebank import RoleBank

# Graphs of one block: roles, with and without gradients, batches with and without their null half.
GRAPH_LIMIT = 64
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
MOST_MAPPED = 32 * 2**20  # bytes; glibc takes no larger MMAP_THRESHOLD
AUTO_PARAMETERS = 500_000_000  # "auto" recomputes activations from this size of the denoiser on
AUTO_DECODER = 20_000_000  # and from this of the VAE; Stable Diffusion's has 84 M


def with_quantized_base(source: ModelSource, args: TrainConfig) -> ModelSource:
    """The teacher with its denoiser quantised, where the run asks for that."""
    kind = args.tuning.base_quantization
    dtype = None if kind == "none" else args.frozen_dtype
    return replace(source, base_quantization=kind, base_dtype=dtype)


def checkpoints_activations(args: TrainConfig, net: nn.Module) -> bool:
    """Whether the run recomputes activations: as told, or by the frozen denoiser's size.

    On a quantised base always: autograd would keep every weight as it was unpacked (torchao).
    """
    if isinstance(args.gradient_checkpointing, bool):
        return args.gradient_checkpointing
    if args.tuning.base_quantization != "none":
        return True
    weights = (p.numel() for name, p in net.named_parameters() if ".lora_" not in name)
    return sum(weights) >= AUTO_PARAMETERS


def checkpoint_decoder(args: TrainConfig, family: Family) -> None:
    """Recompute the activations of the family's own VAE where a loss judges its images: as told, or
    by its size. Its decoder takes more than the denoiser, at 1024 px 12 GiB of bf16 an image.

    Not a video VAE, whose blocks pass a cache on in place, nor one without such blocks.
    """
    vae = getattr(family.pipeline, "vae", None)
    if vae is None or is_video_vae(vae) or not checkpointed_blocks(vae):
        return
    asked, size = args.gradient_checkpointing, sum(p.numel() for p in vae.parameters())
    if asked is True or (asked == "auto" and size >= AUTO_DECODER):
        checkpoint_blocks(vae, no_contexts)


def release_memory() -> None:
    """Give back what was held, before something as large is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory(device: torch.device) -> bool:
    """Let a run on the CPU keep what it frees for its next tensors; returns whether it does.

    glibc hands freed tensors back to the system, and each iteration asks for the same bytes again:
    the system maps and clears every page anew, 5 to 12% of the time of a small UNet's iteration.

    Notes: for the whole process. Left alone where the environment tunes malloc itself.
    """
    tuned = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if device.type != "cpu" or tuned or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, MOST_MAPPED) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def compile_blocks(bank: RoleBank, backend: str = "inductor") -> int:
    """Compile the repeated blocks of every denoiser of the bank; returns how many.

    Those that the stock class names (Diffusers' regional compilation), else the entries of its
    module lists. Blocks of one class share their graphs. Which adapter is active is part of them,
    so each role has its own, and switching between them compiles nothing anew.

    Notes: forward alone, not the call around it: a discriminator's hooks come and go there.
    """
    torch._dynamo.config.recompile_limit = max(GRAPH_LIMIT, torch._dynamo.config.recompile_limit)
    blocks = [block for net in bank.nets.values() for block in repeated_blocks(net)]
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    return len(blocks)


def repeated_blocks(net: Any) -> list[nn.Module]:
    """The blocks that make up most of a stock denoiser."""
    named = type(net)._repeated_blocks or ()
    blocks = [m for m in net.modules() if type(m).__name__ in named]
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    return blocks or [block for entries in lists for block in entries]
