"""Shared set-up: no network, one thread, seeds, quiet libraries, and tiny families by name."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
import torch
from accelerate.utils import set_seed
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from stepdistill.families.family import Family
from stepdistill.families.registry import family_for
from stepdistill.testing.tiny import TINY

torch.set_num_threads(1)
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()


# Every fixture and every test draws from a seed of its own, so that what a run draws depends
# neither on the tests before it nor on the worker that took it.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> None:
    set_seed(crc32(f"{fixturedef.argname} {getattr(request, 'param', '')}".encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    set_seed(crc32(item.nodeid.encode()))


def build_family(name: str) -> Family:
    """A fresh tiny family of that name in TINY."""
    pipeline = TINY[name]()
    return family_for(type(pipeline).__name__)(pipeline)


@pytest.fixture
def make_family() -> Callable[[str], Family]:
    """name in TINY -> a fresh tiny family; RoleBanks change their denoiser, so never share one."""
    return build_family


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that comes to load its model fails: what is refused is refused before."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a weight was about to be loaded")

    monkeypatch.setattr("stepdistill.training.trainer.load_family", refuse)


# Further configurations of a family: parity is checked by default, the rest by -m slow.
VARIANTS = {"edm_plain", "flux_schnell", "pixart_sigma", "sd35", "wan_i2v_kept", "wan_tokens"}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else [])
        for name in sorted(TINY)
    ]
)
def family(request: Any) -> Family:
    """Each tiny family in turn."""
    return build_family(request.param)
