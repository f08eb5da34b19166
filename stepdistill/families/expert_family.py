"""Families whose pipelines may have two denoisers, each for a part of the times.

Where `transformer_2` is there and boundary_ratio is set, both are one network (experts.py). A
teacher may be loaded with one of the two alone: then that one is `transformer` of a pipeline
without a boundary, and `owned` says which times are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stepdistill.families.experts import PARTS, Experts
from stepdistill.families.family import Family


class ExpertFamily(Family):
    """A pipeline of one transformer, or of one for high and one for low noise."""

    def __init__(self, pipeline: Any) -> None:
        self.experts: Experts | None = None
        if self._two(pipeline.config, pipeline.transformer_2 is not None):
            total = pipeline.scheduler.config.num_train_timesteps
            nets = (pipeline.transformer, pipeline.transformer_2)
            self.experts = Experts(*nets, pipeline.config.boundary_ratio * total)
        super().__init__(pipeline)

    @classmethod
    def _two(cls, config: Mapping[str, Any], second: bool) -> bool:
        """Whether there are two experts. Errors: ValueError for a pair that is none."""
        ratio = config.get("boundary_ratio")
        if second != (ratio is not None) or (second and config.get("expand_timesteps")):
            raise ValueError(
                f"{cls.name}: expected transformer and transformer_2 with a boundary_ratio (and "
                "one time for all tokens), or transformer alone without, got boundary_ratio "
                f"{ratio} {'beside' if second else 'without'} transformer_2. Put the missing part "
                "back (model_index.json names them), or train the one at hand: --expert high or "
                "low."
            )
        return second

    @classmethod
    def nets_in(cls, index: Mapping[str, Any]) -> tuple[str, ...]:
        """See Family.nets_in."""
        two = cls._two(index, (index.get("transformer_2") or (None,))[0] is not None)
        return tuple(PARTS.values()) if two else (cls.net_name,)

    @property
    def net(self) -> nn.Module:
        """See Family.net."""
        return super().net if self.experts is None else self.experts

    def net_of(self, nets: Sequence[Any]) -> Any:
        """See Family.net_of."""
        return super().net_of(nets) if self.experts is None else self.experts.of(*nets)

    def parts_of(self, net: Any) -> dict[str, Any]:
        """See Family.parts_of."""
        if not isinstance(net, Experts):
            return super().parts_of(net)
        return {component: getattr(net, part) for part, component in PARTS.items()}
