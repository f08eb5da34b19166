"""Every method x every tiny family x {lora, full}: the plumbing no unit test sees.

Two steps of real training (more of a method in stages) on real Diffusers classes with random
weights: exactly the roles a phase names change, all of their tensors do, the teacher's bytes never
do, and a run resumed after step 1 repeats the rest bit for bit.

`-m every` runs every cell so, which takes hours. By default a fixed sample trains: every method and
every family in either layout, further configurations of a family once. `-m full` adds every case of
a method, trains every method with every family, and resumes both in either layout. A method's
algorithm sees of a family only what its kind says, and a family of a method only which of its calls
the trainer makes, so that a sample grows with the sum of both and not with their product. Enough of
it for every trainer takes the two steps and resumes; the rest takes one step of the same trainer
under the same assertions and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.covering import covering
from support.runs import (
    METHOD_CASES,
    OF_PIXELS,
    UNFIT_IMAGELESS,
    build_trainer,
    fingerprint,
    teacher_dir,
)

from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.families.registry import FAMILIES
from stepdistill.methods import METHODS
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny import TINY, TINY_FAMILY
from stepdistill.trainers import DistillationTrainer

LAYOUTS = ("lora", "full")
Cell = tuple[str, str, str]  # a case of a method, a tiny family, a layout

CELLS: list[Cell] = [
    (case, family, layout)
    for case, family, layout in product(METHOD_CASES, TINY, LAYOUTS)
    if METHOD_CASES[case].fits(family, layout)
]


def pairs_met(cell: Cell) -> set[Any]:
    """What training that cell shows: a method and a family in a layout."""
    case, family, layout = cell
    return {(METHOD_CASES[case].method, layout), (family, layout if family in FAMILIES else None)}


def resume_met(cell: Cell) -> set[str]:
    """What resuming that cell shows: its trainer, and a layout."""
    return {METHODS[METHOD_CASES[cell[0]].method].trainer, cell[2]}


def cost(cell: Cell) -> int:
    """What makes cells slow: discriminators, and adapters in a UNet's many layers."""
    case, family, layout = cell
    adapted_unet = layout == "lora" and TINY_FAMILY[family].net_name == "unet"
    return ("gan" in METHOD_CASES[case].options) + adapted_unet


TRAINED = covering(CELLS, pairs_met, cost)
RESUMED = covering(TRAINED, resume_met, cost)
RESUMED_IN_FULL = {
    *RESUMED,
    *covering(CELLS, lambda c: {(METHOD_CASES[c[0]].method, c[2]), c[1:], c[0]}, cost),
}


def with_every_family() -> list[Cell]:
    """A cell for each method and family that TRAINED does not train together; layouts in turn.
    Further configurations of a family are in RESUMED_IN_FULL, in either layout."""
    met = {(METHOD_CASES[case].method, family) for case, family, _ in TRAINED}
    left: dict[tuple[str, str], list[Cell]] = {}
    for cell in CELLS:
        if cell[1] in FAMILIES and (pair := (METHOD_CASES[cell[0]].method, cell[1])) not in met:
            left.setdefault(pair, []).append(cell)
    return [cells[turn % len(cells)] for turn, cells in enumerate(left.values())]


def test_every_method_is_in_the_matrix() -> None:
    assert {case.method for case in METHOD_CASES.values()} == set(METHODS)


def test_the_sample_meets_every_pair() -> None:
    """All that is promised above, but for what no case of a method fits."""
    promised = (
        (lambda method, family, layout: (method, layout), product(METHODS, LAYOUTS)),
        (lambda method, family, layout: (family, layout), product(TINY, LAYOUTS)),
    )
    assert {family for _, family, _ in TRAINED} == set(TINY)
    for pair, every in promised:
        every = [one for one in every if one[0] in METHODS or one[0] in FAMILIES]
        missing = set(every) - {pair(METHOD_CASES[case].method, *rest) for case, *rest in TRAINED}
        assert missing <= UNFIT
    met = {(METHOD_CASES[case].method, family) for case, family, _ in CELLS}
    assert set(product(METHODS, FAMILIES)) - met <= UNFIT
    trained = {(METHOD_CASES[c].method, f) for c, f, _ in (*TRAINED, *STEPPED_IN_FULL)}
    assert {pair for pair in met if pair[1] in FAMILIES} <= trained  # by `-m full`
    for pair, every in promised:
        resumed = {pair(METHOD_CASES[case].method, *rest) for case, *rest in RESUMED_IN_FULL}
        assert set(every) - resumed <= UNFIT


def test_every_case_trains_and_every_trainer_resumes() -> None:
    assert {case for case, _, _ in RESUMED_IN_FULL} == set(METHOD_CASES)
    resumed = set().union(*map(resume_met, RESUMED))
    assert resumed == {method.trainer for method in METHODS.values()} | {*LAYOUTS}


# A guided teacher is what it distils, and these have no null condition to guide away from.
UNFIT = {
    (distiller, name)
    for distiller in ("lora_guidance", METHODS["lora_guidance"].trainer)
    for name, family in TINY_FAMILY.items()
    if not family.has_null
}
UNFIT |= {
    (method, name)
    for method in OF_PIXELS
    for name, family in TINY_FAMILY.items()
    if family.output == "audios"
}
UNFIT |= {(name, f) for m, f in UNFIT_IMAGELESS for name in (m, METHODS[m].trainer)}


def trained(trainer: DistillationTrainer, case: str) -> dict[str, float]:
    """Its logs; asserts that what should move did, and nothing else."""
    base_before = fingerprint(dict(trainer.family.net.named_parameters()), skip_adapters=True)
    start = {r: fingerprint(trainer.bank.members(r)) for r in trainer.bank.roles}
    changed: set[str] = set()
    for step in trainer.method.part_starts:
        changed |= {role for phase in trainer.method.phases(step) for role in phase.trains}
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
    return logs


STEPPED = [cell for cell in TRAINED if cell not in RESUMED]
STEPPED_IN_FULL = [*STEPPED, *with_every_family()]


@pytest.mark.cells("case family layout", STEPPED_IN_FULL, STEPPED, STEPPED_IN_FULL)
def test_a_step(case, family, layout, tmp_path, tmp_path_factory, monkeypatch) -> None:
    """From weights as though trained; what it would write is met by the two-step cells."""
    monkeypatch.setattr(DistillationTrainer, "save", lambda trainer: None)
    teacher = teacher_dir(family, tmp_path_factory)
    steps = METHOD_CASES[case].one_step
    trainer = build_trainer(case, teacher, layout, tmp_path / "run", max_train_steps=steps)
    _encode_once(trainer.family, teacher)
    _move_off_the_teacher(trainer.bank)
    trained(trainer, case)
    reached = set(trainer.optimizer.state)
    for role in trainer.bank.trained_roles:
        still = {n for n, p in trainer.bank.members(role).items() if p not in reached}
        assert not METHOD_CASES[case].unexpectedly_still(role, still), sorted(still)[:5]


def _move_off_the_teacher(bank: RoleBank) -> None:
    """As a step would: LoRA's A has no gradient while B is zero, nor has a student of score
    distillation while the fake is the teacher."""
    with torch.no_grad():
        for role in bank.trained_roles:
            for name, param in bank.members(role).items():
                if bank.roles[role].source == "teacher" and "lora_A" not in name:
                    param.add_(torch.randn_like(param), alpha=1e-2)


def _encode_once(family: Family, teacher: Path) -> None:
    """Prompts are encoded once a process: the text encoders are those of every such trainer. Of up
    to 512 tokens, padding nearly all, the first 16 reach the networks."""
    for name in ("encode", "encode_text"):
        setattr(family, name, _remembered(getattr(family, name), (teacher, name)))
    for name in ("null", "null_for", "with_images"):
        setattr(family, name, _short(getattr(family, name)))


def _remembered(encode: Callable[..., Cond], kind: tuple[Any, ...]) -> Callable[..., Cond]:
    def remembered(prompts: Sequence[Any]) -> Cond:
        key = (*kind, *prompts)
        if key not in _ENCODED:
            _ENCODED[key] = _first_tokens(encode(prompts), 16)
        return _ENCODED[key]

    return remembered


def _short(make: Callable[..., Cond]) -> Callable[..., Cond]:
    return lambda *given: _first_tokens(make(*given), 16)


def _first_tokens(cond: Cond, number: int) -> Cond:
    short = {k: v[:, :number] for k, v in cond.tensors.items() if k in ("prompt_embeds", "mask")}
    if "length" in cond.tensors:
        short["length"] = cond.tensors["length"].clamp(max=number)
    return Cond({**cond.tensors, **short})


_ENCODED: dict[Any, Cond] = {}


@pytest.mark.cells("case family layout", CELLS, RESUMED, RESUMED_IN_FULL)
def test_two_steps_and_resume(case, family, layout, tmp_path, tmp_path_factory) -> None:
    teacher, folder = teacher_dir(family, tmp_path_factory), tmp_path / "run"
    trainer = build_trainer(case, teacher, layout, folder, checkpointing_steps=1)
    logs = trained(trainer, case)
    resumed: DistillationTrainer = build_trainer(
        case, teacher, layout, folder, resume_from_checkpoint=str(folder / "checkpoint-1")
    )
    assert _without_clock(resumed.train()) == _without_clock(logs)
    for role in trainer.bank.roles:
        first, second = trainer.bank.members(role), resumed.bank.members(role)
        assert fingerprint(first) == fingerprint(second), f"{role} differs after resume"


def _without_clock(logs: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if key != "steps_per_second"}
