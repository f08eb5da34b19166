"""Every method x every tiny family x {lora, full}: the plumbing no unit test sees.

Two steps of real training on real Diffusers classes with random weights: exactly the roles a phase
names change, all of their tensors do, the teacher's bytes never do, and a run resumed after step 1
repeats step 2 bit for bit.

Families beyond the four basic ones meet one score and one regression method by default, and all
methods with `-m slow`: what they add is an adapter, which the parity tests judge.
"""

from __future__ import annotations

import pytest
import torch
from support.runs import METHOD_CASES, build_trainer, fingerprint, teacher_dir

from stepdistill.methods import METHODS
from stepdistill.testing.tiny import TINY

FULL_FAMILIES = {"sd", "sd_v", "sd3", "dit"}
BRIEF_CASES = {("dmd2", "lora"), ("lcm", "lora")}


def marks_of(case: str, family: str, layout: str) -> tuple[pytest.MarkDecorator, ...]:
    """slow for what a family beyond the basic ones leaves to `-m slow`."""
    by_default = family in FULL_FAMILIES or (case, layout) in BRIEF_CASES
    return () if by_default else (pytest.mark.slow,)


CASES = [
    pytest.param(
        case, family, layout, id=f"{case}-{family}-{layout}", marks=marks_of(case, family, layout)
    )
    for case in METHOD_CASES
    for family in TINY
    for layout in ("lora", "full")
    if METHOD_CASES[case].fits(family, layout)
]


def test_every_method_is_in_the_matrix() -> None:
    assert {case.method for case in METHOD_CASES.values()} == set(METHODS)


@pytest.mark.parametrize(("case", "family", "layout"), CASES)
def test_two_steps_and_resume(case, family, layout, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = build_trainer(case, teacher, layout, tmp_path / "run", checkpointing_steps=1)
    base_before = fingerprint(dict(trainer.family.net.named_parameters()), skip_adapters=True)
    start = {r: fingerprint(trainer.bank.members(r)) for r in trainer.bank.roles}
    changed: set[str] = set()
    for phase in trainer.method.phases(0):
        changed |= set(phase.trains)
    logs = trainer.train()

    assert all(torch.isfinite(torch.tensor(v)) for v in logs.values())
    after = fingerprint(dict(trainer.family.net.named_parameters()), skip_adapters=True)
    assert after == base_before, "the teacher's weights changed"
    for role in trainer.bank.trained_roles:
        moved = [
            n for n, h in fingerprint(trainer.bank.members(role)).items() if h != start[role][n]
        ]
        still = set(start[role]) - set(moved)
        assert role in changed
        assert not METHOD_CASES[case].unexpectedly_still(role, still), sorted(still)[:5]

    again = build_trainer(
        case,
        teacher,
        layout,
        tmp_path / "run",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"),
    )
    assert _without_clock(again.train()) == _without_clock(logs)
    for role in trainer.bank.roles:
        first, second = trainer.bank.members(role), again.bank.members(role)
        assert fingerprint(first) == fingerprint(second), f"{role} differs after resume"


def _without_clock(logs: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if key != "steps_per_second"}
