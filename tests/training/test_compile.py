"""Compiled blocks: the numbers of eager ones, and a bounded number of graphs.

aot_eager traces and splits graphs as inductor does and compiles no kernels; inductor, run once,
wants a C++ compiler on CPUs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.runs import teacher_dir
from torch import Tensor
from torch._dynamo.utils import counters

from stepdistill.config.files import method_class, method_config
from stepdistill.config.tuning import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.types import Batch
from stepdistill.families.registry import load_family
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.memory import compile_blocks, repeated_blocks


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run:
    """DMD2: student, fake and teacher on one base, and perhaps a discriminator on its features."""

    def __init__(self, folder: Any, **options: Any) -> None:
        family = load_family(folder)
        config = method_config("dmd2", {"num_steps": 1, "critic_steps": 1, **options})
        self.method = method_class("dmd2")(config, family.setting)
        torch.manual_seed(0)
        self.bank = RoleBank(family, self.method.roles(), Tuning(rank=2))
        for role in ("student", "fake"):
            for name, param in self.bank.members(role).items():
                if "lora_B" in name:
                    param.data.normal_(std=0.05)
        shape = family.sample_shape()
        x0 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        told = ["a red cube", "seven cats"] if family.conditioning == "prompt" else [0, 1]
        self.batch = Batch(cond=family.encode(told), null=family.null(2), shape=shape, x0=x0)

    def step(self, step: int) -> dict[str, Tensor]:
        """Gradients of one student step by phase, role and name."""
        found = {}
        carry: dict[str, object] = {}
        for phase in self.method.phases(step):
            self.bank.train_only(phase.trains)
            ctx = Ctx(step=step, max_steps=10, phase=phase.name, carry=carry)
            phase.loss(self.bank, self.batch, ctx).total.float().backward()
            for role in phase.trains:
                for name, param in self.bank.members(role).items():
                    if param.grad is not None:
                        found[f"{phase.name}/{role}/{name}"] = param.grad.clone()
            for param in self.bank.parameters():
                param.grad = None
        return found


@pytest.mark.every  # minutes of compiling; `full` counts the graphs
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_are_those_of_eager_blocks(backend: str, tmp_path_factory: Any) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    folder = teacher_dir("flux", tmp_path_factory)
    eager, compiled = Run(folder), Run(folder)
    assert compile_blocks(compiled.bank, backend) == 2
    for step in range(2):
        ours, theirs = compiled.step(step), eager.step(step)
        assert ours.keys() == theirs.keys()
        for name, grad in theirs.items():
            scale = grad.abs().max().clamp_min(1e-8)
            assert float((ours[name] - grad).abs().max() / scale) < 1e-4, name
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.full
@pytest.mark.sampled_in_full("True")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_switching_roles_and_phases_compiles_nothing_anew(
    checkpointing: bool, tmp_path_factory: Any
) -> None:
    run = Run(teacher_dir("flux", tmp_path_factory), gan={"weight_g": 1e-3})
    kinds = {type(block) for block in repeated_blocks(run.bank.nets["base"])}
    compile_blocks(run.bank, "aot_eager")
    if checkpointing:
        run.bank.enable_gradient_checkpointing()
    for step in range(3):
        run.step(step)
    graphs = counters["stats"]["unique_graphs"]
    for step in range(3, 6):
        run.step(step)
    assert counters["stats"]["unique_graphs"] == graphs
    assert graphs <= 6 * len(kinds)


def test_the_blocks_are_those_that_the_stock_class_names(tmp_path_factory: Any) -> None:
    net = load_family(teacher_dir("flux", tmp_path_factory)).net
    found = {type(block).__name__ for block in repeated_blocks(net)}
    assert found == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
