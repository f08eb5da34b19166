"""Fixed samples of a sweep: the few cells that meet all pairs that the whole of it meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations
from typing import Any, TypeVar

Cell = TypeVar("Cell")
# Parameters whose pairs a sample meets; of the others it meets every value.
PAIRED = ("method", "case", "family", "layout", "student", "fake")


def covering(
    cells: Iterable[Cell],
    met: Callable[[Cell], set[Any]],
    cost: Callable[[Cell], int] = lambda cell: 0,
) -> list[Cell]:
    """Cells that meet all that `cells` meet: again and again the one that adds most.

    Of equals one of least cost; of these, the first of those whose parts are in least cells so far.
    """
    left = {cell: met(cell) for cell in cells}
    wanted, chosen = set().union(*left.values()), []
    used: Counter[Any] = Counter()
    while wanted:
        gains = {cell: len(met & wanted) for cell, met in left.items()}
        most = max(gains.values())
        equals = (cell for cell, gain in gains.items() if gain == most)
        best = min(equals, key=lambda c: (cost(c), sum(used[part] for part in left[c])))
        chosen.append(best)
        used.update(left[best])
        wanted -= left.pop(best)
    return chosen


def pairs_of(params: Mapping[str, Any], pairs: bool = True) -> set[Any]:
    """What one set of a test's parameters meets: values by name, and pairs of those of PAIRED."""
    values = {(name, str(value)) for name, value in params.items()}
    paired = sorted(value for value in values if pairs and value[0] in PAIRED)
    return values | set(combinations(paired, 2))


def sample(
    params: Mapping[str, Mapping[str, Any]], pairs: bool = True, **limits: Collection[Any]
) -> list[str]:
    """Of a sweep's cells by name those that meet what it meets, or that part of it.

    Args: pairs: False where values are enough. limits: by a parameter's name the values to meet.
    """
    met = {
        name: pairs_of(given, pairs)
        for name, given in params.items()
        if all(given[key] in values for key, values in limits.items())
    }
    return covering(met, met.__getitem__)
