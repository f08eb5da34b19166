"""Fixed samples of sweeps: what they meet, and that they are the same each time."""

from __future__ import annotations

from itertools import product

from support.covering import covering, pairs_of, sample

AXES = {"family": ("sd", "sd3", "dit"), "layout": ("lora", "full"), "dtype": ("a", "b", "c")}
CELLS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
SWEEP = {"-".join(cell.values()): cell for cell in CELLS}


def met(names, pairs: bool = True):
    return set().union(*(pairs_of(SWEEP[name], pairs) for name in names))


def test_a_sample_meets_every_pair_and_every_value() -> None:
    found = sample(SWEEP)
    assert met(found) == met(SWEEP)
    assert {(SWEEP[n]["family"], SWEEP[n]["layout"]) for n in found} == set(
        product(AXES["family"], AXES["layout"])
    )
    assert len(found) == 6  # of 18
    assert found == sample(SWEEP)


def test_values_alone() -> None:
    found = sample(SWEEP, pairs=False)
    assert met(found, pairs=False) == met(SWEEP, pairs=False)
    assert len(found) == 3


def test_some_values_of_one_parameter() -> None:
    found = sample(SWEEP, family=("sd3", "dit"))
    assert {SWEEP[name]["family"] for name in found} == {"sd3", "dit"}
    assert met(found) == met(name for name in SWEEP if not name.startswith("sd-"))


def test_of_equals_the_cheapest_is_taken() -> None:
    cells = {"dear": {"x"}, "cheap": {"x"}, "needed": {"x", "y"}}
    costs = {"dear": 2, "cheap": 0, "needed": 3}
    assert covering(cells, cells.__getitem__, costs.__getitem__) == ["needed"]
    del cells["needed"]
    assert covering(cells, cells.__getitem__, costs.__getitem__) == ["cheap"]
