"""Shared set-up: no network, one thread, seeds, quiet libraries, markers, tiny families by name.

Libraries are imported late: with `-n 2` the process that hands out the tests needs none of them.
"""

from __future__ import annotations

import gc
import os
import random
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest
from support.covering import sample

if TYPE_CHECKING:
    from stepdistill.families.family import Family


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """`-m full` selects the default tests, too, and `-m every` all but what needs a GPU or takes
    times."""
    rest = {"full": "not every and not gpu and not benchmark", "every": "not gpu and not benchmark"}
    config.option.markexpr = rest.get(config.option.markexpr, config.option.markexpr)


def pytest_collection(session: pytest.Session) -> None:
    if getattr(session.config.option, "numprocesses", None):
        return  # this process runs no test
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `sampled` all but a fixed sample of its parameters are for `-m full`; of one
    marked `sampled_in_full` all but a sample of what is for `-m full` are for `-m every`.

    sampled(family=("sd3", ...)): a sample of those values alone; sampled(pairs=False): one that
    meets values and no pairs; sampled("sd3-full", ...): those sets of parameters, by their ids.
    """
    for mark, rest in (("sampled", "full"), ("sampled_in_full", "every")):
        sweeps: dict[str, dict[str, Any]] = {}
        for item in items:
            if item.get_closest_marker(mark):
                sweeps.setdefault(item.nodeid.partition("[")[0], {})[item.nodeid] = item
        for test, sweep in sweeps.items():
            for name in left_out(config, test, sweep, mark, rest):
                sweep[name].add_marker(rest)


def left_out(
    config: pytest.Config, test: str, sweep: dict[str, Any], mark: str, rest: str
) -> set[str]:
    """Which of a test's items its marker of that name leaves to `-m REST`, by their ids."""
    params = {
        name: item.callspec.params
        for name, item in sweep.items()
        if not item.get_closest_marker(rest) and (rest == "full" or item.get_closest_marker("full"))
    }
    given = next(iter(sweep.values())).get_closest_marker(mark)
    ids = {f"{test}[{name}]" for name in given.args}
    unknown = set() if any("::" in arg for arg in config.args) else ids - sweep.keys()
    if unknown:
        raise pytest.UsageError(f"{mark}: expected ids of the test, got {sorted(unknown)}.")
    return params.keys() - (ids or set(sample(params, **given.kwargs)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def seed_by(name: str) -> None:
    """As Accelerate's set_seed, but for accelerators that are not there: torch.manual_seed queues
    their seeds with the stack of each call, which took 2 ms, at every fixture."""
    import numpy as np
    import torch

    seed = crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


# Every fixture and every test draws from a seed of its own, so that what a run draws depends
# neither on the tests before it nor on the worker that took it.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> None:
    seed_by(f"{fixturedef.argname} {getattr(request, 'param', '')}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_by(item.nodeid)


def build_family(name: str) -> Family:
    """A fresh tiny family of that name in TINY."""
    from stepdistill.families.registry import family_for
    from stepdistill.testing.tiny import TINY
    from stepdistill.testing.tiny_video import small_references

    small_references()
    pipeline = TINY[name]()
    return family_for(type(pipeline).__name__)(pipeline)


@pytest.fixture
def make_family() -> Callable[[str], Family]:
    """name in TINY -> a fresh tiny family; RoleBanks change their denoiser, so never share one."""
    return build_family


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It is heard, though these tests may run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def forked_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's students train in children of this process, where nothing is imported anew;
    tests/test_elsewhere.py has one in a fresh interpreter."""
    from support.processes import ForkedRun

    monkeypatch.setattr("stepdistill.comparison.runs.subprocess.Popen", ForkedRun)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that comes to load its model fails: what is refused is refused before."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a weight was about to be loaded")

    monkeypatch.setattr("stepdistill.training.trainer.load_family", refuse)


def sorted_cells(
    config: pytest.Config, cells: Iterable[Any], default: Collection[Any], full: Collection[Any]
) -> list[Any]:
    """Parameters with the markers that leave them out; those of `every`, thousands, are not even
    collected where they would be."""
    made = []
    for cell in cells:
        marks = [] if cell in default else [pytest.mark.full if cell in full else pytest.mark.every]
        if marks != [pytest.mark.every] or "not every" not in config.option.markexpr:
            made.append(pytest.param(*cell, id="-".join(cell), marks=marks))
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: each tiny family in turn; further configurations of one with `-m full` alone.

    Not where a test names the families itself, or its file has a fixture of that name.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    if cells := metafunc.definition.get_closest_marker("cells"):
        metafunc.parametrize(cells.args[0].split(), sorted_cells(metafunc.config, *cells.args[1:]))
        return
    given = {name for mark in marks for name in str(mark.args[0]).replace("'", " ").split()}
    if hasattr(metafunc.module, "family"):
        return
    if "family" in metafunc.fixturenames and "family" not in given:
        from stepdistill.families.registry import FAMILIES
        from stepdistill.testing.tiny import TINY

        further = {name: [pytest.mark.full] for name in TINY if name not in (*FAMILIES, "sd_v")}
        params = [pytest.param(name, marks=further.get(name, [])) for name in sorted(TINY)]
        metafunc.parametrize("family", params, indirect=True)


@pytest.fixture
def family(request: Any) -> Family:
    """Each tiny family in turn."""
    return build_family(request.param)
