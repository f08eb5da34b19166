"""FSDP2: the networks of a run in shards, one a process, gathered block by block while they run.

Accelerate leaves its FSDP plugin out on CPU and prepares one model as a whole, so torch's own
`fully_shard` is driven here, on GPUs and on gloo alike: each block is a group, and what is left of
all networks is gathered for the length of a step. A network is no group of its own: its output's
hook would gather it for the backward pass, which a loss on features alone never meets. Weights,
gradients and moments are DTensors cut along their first dimension. Role switching, `train_only` and
phases see the same parameters as elsewhere.

Gradients are reduced at every micro-batch: to keep them whole until the last one would hold all of
them. Mixed precision is autocast's, as elsewhere: adapters and own copies are gathered in float32.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from stepdistill.config.run import TrainConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets
from stepdistill.core.types import Batch, Losses
from stepdistill.training.step import TrainStep

_ASKED = "ACCELERATE_USE_FSDP"
_YES = ("1", "true", "yes")


def sharding_asked() -> bool:
    """Whether the launcher asks for FSDP2. Errors: ValueError for another FSDP."""
    if os.environ.get(_ASKED, "false").lower() not in _YES:
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate: expected fsdp_version 2, got {version} (it flattens frozen and trained "
            "weights together). Launch with configs/accelerate/fsdp2.yaml."
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() in _YES:
        raise ValueError(
            "accelerate: expected fsdp_offload_params false, got true (weights are not kept on the "
            "CPU). Launch with configs/accelerate/fsdp2.yaml."
        )
    return True


def check_sharding(args: TrainConfig) -> None:
    """Errors: ValueError for settings that have not been made to work in shards."""
    if args.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision: expected no or bf16 under FSDP2, got fp16 (its gradient scaler has "
            "not been run on shards). Set --mixed_precision bf16."
        )
    if args.tuning.base_quantization != "none":
        raise ValueError(
            f"tuning.base_quantization: expected none under FSDP2, got "
            f"{args.tuning.base_quantization} (packed weights can't be cut). Launch with "
            "configs/accelerate/ddp.yaml."
        )
    if args.compile:
        raise ValueError(
            "compile: expected false under FSDP2, got true (compiled blocks have not been run in "
            "shards). Set --compile false."
        )
    if args.optimizer != "adamw":
        raise ValueError(
            f"optimizer: expected adamw under FSDP2, got {args.optimizer} (its moments have not "
            "been run on shards, which are smaller anyway). Set --optimizer adamw."
        )


@contextmanager
def without_plugin() -> Iterator[None]:
    """Within: Accelerate sees a plain launch of many processes, and shards nothing itself."""
    with mock.patch.dict(os.environ, {_ASKED: "false"}):
        yield


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """What is gathered at once, inner ones first: the entries of a network's module lists, and
    within them the blocks that its class names as not to be split."""
    named = set(getattr(net, "_no_split_modules", None) or ())
    lists = [m for m in net.children() if isinstance(m, nn.ModuleList)]
    entries = {id(entry) for entries in lists for entry in entries}
    blocks = [
        module
        for module in net.modules()
        if module is not net
        and (id(module) in entries or type(module).__name__ in named)
        and any(True for _ in module.parameters())
    ]
    if isinstance(net, DiTTransformer2DModel):  # calls a part of its first block from outside it
        blocks.append(net.transformer_blocks[0].norm1.emb)
    return blocks[::-1]  # modules() goes from the outside in


def shard(step: TrainStep, device: torch.device) -> None:
    """Cut the weights of every network and head of the step's bank among all processes.

    Looks up the roles' parameters anew: optimisers are built after this.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Networks whose output is a reshaped view are never changed in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module.*returned a view")
    for net in step.bank.nets.values():
        for block in blocks_of(net):
            fully_shard(block, mesh=mesh)
    sharded: Any = fully_shard(step, mesh=mesh)
    step.bank.rebind()
    nothing: Any = None
    with torch.no_grad():
        step(_no_loss, nothing, Ctx())  # settles that the step is the root, whoever runs first
    sharded.reshard()  # what stays gathered would miss the next change of requires_grad


def _no_loss(_nets: Nets, _batch: Batch, _ctx: Ctx) -> Losses:
    return Losses(torch.zeros(()), {})


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's weights are in shards, so that using them takes all processes."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within: each process holds all weights whole, so that one may run the networks alone.

    Does nothing for a module that is not in shards. Call on all processes, outside any step.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        # One process has called networks that the others have not: none may remember its calls.
        module.reset_iter_state()
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
