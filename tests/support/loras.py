"""LoRA files as people train them on a tiny teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stepdistill.families.registry import load_family


def style_lora(folder: Path, out: Path, seed: int, rank: int = 2, alpha: int = 7) -> dict:
    """A LoRA with random weights on a saved teacher; returns its delta of each module."""
    family = load_family(folder)
    net = family.net
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "to_out.0"])
    net.add_adapter(config, "style")
    generator = torch.Generator().manual_seed(seed)
    for name, param in net.named_parameters():
        if ".lora_" in name:
            param.data = 0.3 * torch.randn(param.shape, generator=generator)
    deltas = {
        name: layer.get_delta_weight("style").detach()
        for name, layer in net.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    type(family.pipeline).save_lora_weights(
        out,
        **{
            f"{family.net_name}_lora_layers": get_peft_model_state_dict(net, adapter_name="style"),
            f"{family.net_name}_lora_adapter_metadata": net.peft_config["style"].to_dict(),
        },
    )
    return deltas
