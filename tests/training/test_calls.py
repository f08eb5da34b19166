"""What an iteration asks of its networks: no call twice, guidance in one batch, no waiting.

Counted on two updates of every method with a tiny Stable Diffusion; the second is looked at.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.runs import METHOD_CASES, build_trainer, teacher_dir
from torch import Tensor

from stepdistill.methods import METHODS
from stepdistill.models.role_denoiser import RoleDenoiser

BSZ = 2
# (adapter or "base", rows, with gradients) of each call of one iteration at batch 2, in order.
TEACHER = ("base", 2 * BSZ, False)  # guided: both conditions in one batch
SEES = ("base", BSZ, True)  # the frozen teacher's features, under a head that trains
CALLS: dict[str, list[tuple[str, int, bool]]] = {
    "dmd2": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True),
        ("student", BSZ, False), ("fake", BSZ, True),
    ],
    "dmd": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("student", BSZ, True),
        ("fake", BSZ, True),
    ],
    "dmd2_gan": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True),
        ("fake", BSZ, True), ("fake", BSZ, True), ("fake", BSZ, True),
    ],
    "f_distill": [
        ("student", BSZ, True), ("fake", BSZ, True), TEACHER,
        ("fake", BSZ, True), ("fake", BSZ, True), ("fake", BSZ, True),
    ],
    "vsd": [("student", BSZ, True), ("fake", 2 * BSZ, False), TEACHER, ("fake", BSZ, True)],
    "tscd": [("student", BSZ, True), TEACHER, ("target", BSZ, False)],
    "pcm": [
        ("student", BSZ, False), TEACHER, ("student", BSZ, False), SEES, SEES,
        ("student", BSZ, True), TEACHER, ("student", BSZ, False), SEES,
    ],
    "lcm": [("student", BSZ, True), TEACHER, ("student", BSZ, False)],
    "cd": [("student", BSZ, True), TEACHER, ("target", BSZ, False)],
    "progressive": [("target", BSZ, False), ("target", BSZ, False), ("student", BSZ, True)],
    "reflow": [("student", BSZ, True)],
    "reflow_distill": [("student", BSZ, True)],
    "rfpp": [("student", BSZ, True)],
    "slimflow": [("student", BSZ, True)],
    "slimflow_distill": [("student", BSZ, True), ("student", BSZ, True), ("base", BSZ, False)],
}  # fmt: skip
# Where a tensor is read into Python: numbers that are drawn, or follow from options, on the host.
HOST = {
    ("context.py", "shared_randint"),
    ("context.py", "shared_rand"),
    ("times.py", "uniform_grid"),
    ("dmd2_config.py", "draw_times"),
    ("halving.py", "trailing_grid"),
    ("reflow.py", "times"),
    ("slimflow.py", "trained_times"),
    ("order.py", "_permutation"),
    ("path.py", "renoise"),  # on the CPU alone
}
READS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy")


@dataclass
class Iteration:
    """One iteration: calls as in CALLS, the inputs they saw, and where tensors were read."""

    calls: list[tuple[str, int, bool]] = field(default_factory=list)
    inputs: list[tuple[int, str, str]] = field(default_factory=list)
    reads: set[tuple[str, str]] = field(default_factory=set)


def digest(*tensors: Tensor | None) -> str:
    made = hashlib.sha256()
    for value in tensors:
        if value is not None:
            made.update(bytes(value.detach().contiguous().flatten().view(torch.uint8)))
    return made.hexdigest()


@contextmanager
def observed(monkeypatch: pytest.MonkeyPatch, seen: Iteration) -> Iterator[None]:
    """Within: `seen` fills."""
    raw = RoleDenoiser.raw

    def call(self: Any, x_t: Tensor, t: Tensor, cond: Any, s: Any, w: Any, features: Any) -> Any:
        with monkeypatch.context() as unread:
            for name, own in originals.items():
                unread.setattr(Tensor, name, own)
            told = digest(x_t, t, s, w, *cond.tensors.values())
        role = self._adapter or "base"
        seen.calls.append((role, len(x_t), torch.is_grad_enabled()))
        seen.inputs.append((id(self._net), role, told))
        return raw(self, x_t, t, cond, s, w, features)

    def reading(own: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            code = sys._getframe(1).f_code
            seen.reads.add((code.co_filename.rpartition("/")[2], code.co_name))
            return own(tensor, *args, **kwargs)

        return read

    originals = {name: getattr(Tensor, name) for name in READS}
    with monkeypatch.context() as patch:
        patch.setattr(RoleDenoiser, "raw", call)
        for name, own in originals.items():
            patch.setattr(Tensor, name, reading(own))
        yield


def iteration(case: str, monkeypatch: Any, tmp_path: Any, factory: Any) -> Iteration:
    """The second of two updates."""
    trainer: Any = build_trainer(
        case, teacher_dir("sd", factory), "lora", tmp_path / "run",
        logging_steps=100, checkpointing_steps=0,
    )  # fmt: skip
    seen, update = Iteration(), trainer._update

    def watched(*args: Any) -> None:
        if trainer.step == 0:
            return update(*args)
        with observed(monkeypatch, seen):
            return update(*args)

    trainer._update = watched
    trainer.train()
    return seen


@pytest.mark.filterwarnings("ignore:.*an eps-prediction student")
@pytest.mark.parametrize("case", CALLS)
def test_an_iteration_calls_its_networks_so(case, monkeypatch, tmp_path, tmp_path_factory) -> None:
    seen = iteration(case, monkeypatch, tmp_path, tmp_path_factory)
    assert seen.calls == CALLS[case]
    assert len(set(seen.inputs)) == len(seen.inputs), "a network was asked the same twice"
    assert seen.reads <= HOST, "reading a tensor would wait for the device"


def test_every_method_is_counted() -> None:
    assert {METHOD_CASES[case].method for case in CALLS} == set(METHODS)
