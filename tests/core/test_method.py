"""Method's facts and guidance, read from the options of a class made for it."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field

from stepdistill.core.method import Method, MethodConfig, Phase, Role, Setting
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec


class Options(MethodConfig):
    guidance_range: tuple[float, float] = (2.0, 6.0)
    guidance: float = 3.0
    embed_guidance: bool = False
    w: float | None = Field(default=None)


class Guided(Method[Options]):
    name = "guided"
    Config = Options
    status = "trained on real data here"
    guidance_options = ("guidance_range", "guidance", "embed_guidance")

    def roles(self) -> dict[str, Role]:
        return {}

    def phases(self, step: int) -> tuple[Phase, ...]:
        return ()

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return SamplerSpec((1.0,), w=self.config.w)


class Derived(Guided):
    name = "derived"
    aliases: ClassVar = {"other": {}}


def test_facts_that_a_class_states_are_its_own_and_no_derived_class_s() -> None:
    assert Guided.status == "trained on real data here"
    assert Derived.status == "derived"
    assert Derived.aliases == {"other": {}}
    assert Guided.aliases == {}


@pytest.mark.parametrize(("w", "guidance"), [(None, 4.0), (0.0, 1.0), (2.5, 3.5)])
def test_validation_s_teacher_has_the_sampler_s_guidance_or_the_middle(w, guidance) -> None:
    method = Guided(Options(w=w), Setting(FlowPath(), "flow"))
    assert method.teacher_guidance == guidance


def test_options_that_hold_guidance_at_one_number() -> None:
    options = Guided.options_at(1.5)
    assert options == {"guidance_range": [1.5, 1.5], "guidance": 1.5, "embed_guidance": False}
    assert Guided.guidance_of(Options(**options)) == (1.5, 1.5)
