"""Two denoisers that share the noise levels between them (Wan 2.2 A14B), as one network.

The stock call runs `transformer` (high noise) where a step's time is at least boundary_ratio times
num_train_timesteps, `transformer_2` (low noise) below. Here each row of a batch goes where its own
time sends it. Roles, adapters, copies and averages see one network with the parts `high` and `low`.
"""

# Shapes: B batch, C channels, F frames, H, W spatial.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule

from stepdistill.core.times import SAME_TIME

PARTS = {"high": "transformer", "low": "transformer_2"}  # components of the stock pipelines


class Experts(nn.Module):
    """The high- and the low-noise network of one architecture.

    Args: boundary: the model time from which on `high` is asked; equality goes to it.
    Errors: ValueError where the two differ in architecture.
    """

    _repeated_blocks = WanTransformer3DModel._repeated_blocks
    _no_split_modules = WanTransformer3DModel._no_split_modules

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary
        nets: list[Any] = [high, low]
        configs = [_plain(net.config) for net in nets]
        if configs[0] != configs[1]:
            differ = sorted(k for k, v in configs[0].items() if configs[1].get(k) != v)
            raise ValueError(
                f"transformer_2: expected the architecture of transformer, got another {differ}. "
                "Train one expert a run: --expert high, then low."
            )

    # ------------------------------------------- what is read of a stock network
    @property
    def config(self) -> FrozenDict:
        """The configuration of both, and the boundary."""
        high: Any = self.high
        return FrozenDict({**high.config, "boundary": self.boundary})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Experts:
        """Two networks at their random start. Args: config: see `config`."""
        options = {key: value for key, value in config.items() if key != "boundary"}
        high, low = (WanTransformer3DModel.from_config(options) for _ in range(2))
        return cls(high, low, config["boundary"])

    def of(self, high: nn.Module, low: nn.Module) -> Experts:
        """Two others in these ones' place."""
        return Experts(high, low, self.boundary)

    def register_to_config(self, **entries: Any) -> None:
        """Note entries in both configurations."""
        for net in (self.high, self.low):
            stock: Any = net
            stock.register_to_config(**entries)

    @property
    def dtype(self) -> torch.dtype:
        """Of most weights."""
        high: Any = self.high
        dtype: torch.dtype = high.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        high: Any = self.high
        device: torch.device = high.device
        return device

    # ------------------------------------------------------------------ the call
    def forward(self, timestep: Tensor, **inputs: Any) -> tuple[Tensor]:
        """(output (B, C, F, H, W),), each row by the expert of its time.

        Args: timestep: (B,) model times. inputs: of the stock network; tensors are batch-first.
        Notes: which rows are whose is read on the host, once a call: networks of this size take
            seconds, and to ask both for every row would double them. In shards all processes
            gather the same blocks, so an expert that any of them asks, all do, for nothing.
        """
        high = self.high_rows(timestep)
        of = {
            expert: [row for row, is_high in enumerate(high) if is_high == (expert is self.high)]
            for expert in (self.high, self.low)
        }
        asked = self._anywhere(list(map(bool, of.values())), timestep.device)
        inputs["timestep"], outs, idle = timestep, list[Tensor](), list[Tensor]()
        for (expert, rows), here_or_there in zip(of.items(), asked, strict=True):
            if not here_or_there:
                continue
            some = inputs
            if len(rows) < len(high):
                some = {
                    name: value[rows or [0]] if isinstance(value, Tensor) else value
                    for name, value in inputs.items()
                }
            (outs if rows else idle).append(expert(**some)[0])
        out = outs[0]
        if len(outs) == 2:
            order = [row for rows in of.values() for row in rows]
            back = sorted(range(len(order)), key=order.__getitem__)
            out = torch.cat(outs)[back]
        for unread in idle:  # a graph without a gradient
            out = out + 0.0 * unread
        return (out,)

    def _anywhere(self, here: list[bool], device: torch.device) -> list[bool]:
        """Which of the two experts some process of a sharded run asks; else those asked here."""
        blocks: Any = self.high.blocks
        if not isinstance(blocks[0], FSDPModule):
            return here
        asked = torch.tensor(here, dtype=torch.int32, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return [bool(count) for count in asked.tolist()]

    def high_rows(self, timestep: Tensor) -> list[bool]:
        """Whether each of the rows is the high expert's; of times without numbers (a forecast's)
        all are: the two cost the same."""
        if isinstance(timestep, FakeTensor):
            return [True] * len(timestep)
        rows: list[bool] = (timestep >= self.boundary * (1.0 - SAME_TIME)).tolist()
        return rows


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that make an architecture."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def one_expert(
    expert: str, boundary_ratio: float | None, pipeline: str
) -> tuple[str | None, tuple[float, float]]:
    """(the component that is left out, (lowest, highest) time of what is loaded) of a model.

    Errors: ValueError where one of two is asked for and there are no two.
    """
    if expert == "both":
        return None, (0.0, 1.0)
    if boundary_ratio is None:
        raise ValueError(
            f"expert: expected both for a model of one denoiser ({pipeline} without a "
            f"boundary_ratio), got {expert}. Leave it out."
        )
    if expert == "high":
        return PARTS["low"], (boundary_ratio, 1.0)
    return PARTS["high"], (0.0, boundary_ratio)
