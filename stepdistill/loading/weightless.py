"""A network as its configuration describes it, without its weights: for what only asks its shapes.

Pipelines read their denoiser's configuration, device and dtype to encode a prompt; none of its
weights. All of them are one zero here, seen in every shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn


def weightless(
    where: str, index: Mapping[str, Any], name: str, device: torch.device, **hub: Any
) -> nn.Module:
    """The network `name` of a pipeline folder or Hub id, from its config.json alone.

    Args: index: model_index.json.
    Errors: ValueError where the configuration can't be read or describes no such network.
    """
    library, cls = index[name]
    net_cls: Any = getattr(import_module(library), cls)
    try:
        config = net_cls.load_config(where, subfolder=name, **hub)
        with init_empty_weights():
            net: nn.Module = net_cls.from_config(config)
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError) as err:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a readable {name}/config.json of {cls}, got "
            f"{' '.join(str(err).split())[:300]}."
        ) from err
    zero = torch.zeros((), device=device)
    for module in net.modules():
        for key, param in module.named_parameters(recurse=False):
            shared = nn.Parameter(zero.expand(param.shape), requires_grad=False)
            setattr(module, key, shared)
    return net
