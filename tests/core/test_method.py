"""Method's facts and guidance, read from the options of a class made for it."""

from __future__ import annotations

from dataclasses import replace
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


class Told(Guided):
    name = "told"
    guidance_options = ("w",)


def test_guidance_is_laid_over_the_first_option_that_holds_one() -> None:
    assert Guided.guided_by({}, 4.0) == {"guidance_range": [4.0, 4.0]}
    assert Guided.guided_by({}, (2.0, 8.0)) == {"guidance_range": [2.0, 8.0]}
    assert Guided.guided_by({"guidance_range": None}, (2.0, 8.0)) == {"guidance": 5.0}  # the middle
    assert Guided.guided_by({}, 1.0) == Guided.options_at(1.0)


def test_a_law_of_the_method_s_own_is_left_alone() -> None:
    """A teacher guided by none, and an option that is off by default."""
    assert Guided.guided_by({"guidance_range": [1.0, 1.0]}, 4.0) == {}
    assert Told.guided_by({"w": 3.0}, 4.0) == {}
    assert Guided.guided_by({"guidance_range": None, "guidance": None}, 4.0) == {}


def test_a_teacher_s_own_sampler_is_its_scheduler_s_where_one_is_known() -> None:
    setting = Setting(FlowPath(), "flow", 3.0)
    plain = setting.own_sampler(2)
    assert plain == SamplerSpec((1.0, 0.75), "ode", trained_times=(1.0, 0.75), keeps_scheduler=True)
    known = replace(setting, own=lambda steps, shift: SamplerSpec((1.0, 1.0 / (steps * shift))))
    assert known.own_sampler(2).times == (1.0, 1.0 / 6.0)


def test_options_that_differ_from_their_defaults_are_named() -> None:
    assert Options(guidance=3.0, w=1.0).changed("guidance", "w") == ("w",)
    assert Options().changed("guidance", "w", "guidance_range") == ()
