"""An optimiser's state as named tensors, for files that hold tensors alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """PARAMETER.NAME -> tensor, of an optimiser whose whole state is tensors, such as Adam."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, one in state.items() for name, value in one.items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; the groups' settings stay this optimiser's."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, moment = name.partition(".")
        state.setdefault(int(place), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
