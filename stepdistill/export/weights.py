"""A student's weights as a stock module: its own copy, or the base with the adapter merged in."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stepdistill.loading.quantization import is_quantized
from stepdistill.roles.rolebank import RoleBank


@torch.no_grad()
def stock_net(bank: RoleBank, role: str, adapter: bool = True) -> nn.Module:
    """A stock Diffusers module with the role's weights; the bank is left as it is.

    Merging adds scale * B A to each adapted weight in float32, then returns to the base's dtype.
    Args: adapter: where false, the base that the role's adapter sits on, without it.
    """
    if role in bank.nets:
        return bank.nets[role]
    base: Any = bank.base_of(role)
    if is_quantized(base):
        return _merged_anew(bank, role, adapter)
    deltas = {
        name: layer.get_delta_weight(role)
        for name, layer in base.named_modules()
        if isinstance(layer, BaseTunerLayer) and bank.members(role) and adapter
    }
    state = {}
    for key, value in base.state_dict().items():
        if ".lora_" in key:
            continue
        owner, _, leaf = key.rpartition(".")
        layer_name = owner.removesuffix(".base_layer")
        if leaf == "weight" and layer_name in deltas:
            value = (value.float() + deltas[layer_name].float().to(value.device)).to(value.dtype)
        state[key.replace(".base_layer.", ".")] = value
    merged: nn.Module = type(base).from_config(base.config)
    merged.load_state_dict(state)
    return merged.to(device=base.device, dtype=base.dtype).eval().requires_grad_(False)


def _merged_anew(bank: RoleBank, role: str, adapter: bool) -> nn.Module:
    """The weights that a quantised base was made from, read again on the CPU, plus the adapter.

    Errors: ValueError where they are not known: the teacher came quantised.
    """
    if bank.family.unquantized is None:
        raise ValueError(
            "export: expected a base that was quantised for this run (its weights are merged with "
            "the adapter), got a teacher that came quantised. Export format lora."
        )
    net = bank.family.unquantized()
    for name, layer in bank.base_of(role).named_modules():
        if isinstance(layer, BaseTunerLayer) and bank.members(role) and adapter:
            weight: Any = net.get_submodule(name).weight
            delta = layer.get_delta_weight(role).float().cpu()
            weight.data = (weight.data.float() + delta).to(weight.dtype)
    return net.eval().requires_grad_(False)
