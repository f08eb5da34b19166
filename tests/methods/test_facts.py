"""What stands on the methods is so."""

from __future__ import annotations

import pytest

from stepdistill.config.files import method_config, parse_run_config
from stepdistill.config.method_names import resolve_method
from stepdistill.core.method import FIELDS, Method, Setting
from stepdistill.core.path import FlowPath
from stepdistill.methods import METHODS
from stepdistill.methods.reflow import Reflow
from stepdistill.trainers import DistillationTrainer, trainer_class

ALIASES = [(alias, name) for name, cls in METHODS.items() for alias in cls.aliases]


@pytest.mark.parametrize("name", METHODS)
def test_default_options_need_the_data_that_is_told(name) -> None:
    cls = METHODS[name]
    needs = cls(cls.Config(), Setting(FlowPath(), "flow")).needs
    images = {"x0"} if "real" in needs else set()  # of either source: a discriminator's
    assert (needs - {"real"}) | images == FIELDS[cls.data]


@pytest.mark.parametrize("name", METHODS)
def test_options_for_its_steps_make_a_student_of_so_many(name) -> None:
    cls = METHODS[name]
    for steps in cls.steps:
        config = cls.Config(**cls.for_steps(steps))
        assert len(cls(config, Setting(FlowPath(), "flow")).sampler().times) == steps


@pytest.mark.parametrize("name", METHODS)
def test_its_trainer_serves_it(name) -> None:
    assert name in trainer_class(name).methods()


def test_a_method_that_names_no_trainer_has_the_base() -> None:
    assert Method.trainer == DistillationTrainer.__name__
    assert DistillationTrainer.methods() == ()


@pytest.mark.parametrize(("alias", "name"), ALIASES)
def test_a_user_s_name_stands_for_options_that_the_method_has(alias, name) -> None:
    assert resolve_method(alias.upper().replace("_", "-"))[0] == name
    cls = METHODS[name]
    assert method_config(alias, {}) == cls.Config(**cls.aliases[alias])


def test_users_names_are_of_one_method_each() -> None:
    names = [alias for alias, _ in ALIASES]
    assert len({*names, *METHODS}) == len(names) + len(METHODS)


def test_a_derived_method_does_not_take_the_names_of_its_base() -> None:
    class Mine(Reflow):
        name = "mine"

    assert Reflow.aliases
    assert (Mine.aliases, Mine.digits, Mine.status) == ({}, (), "derived")
    assert (Mine.trainer, Mine.data) == (Reflow.trainer, Reflow.data)


def test_a_user_s_name_works_as_a_flag_under_given_options() -> None:
    argv = ["--pretrained_model_name_or_path", "x", "--method", "snoopi"]
    run = parse_run_config(argv)
    assert (run.method, run.method_config["guidance_range"]) == ("vsd", (0.5, 4.0))
    run = parse_run_config([*argv, "--method_config.guidance_range", "[1,2]"])
    assert run.method_config["guidance_range"] == (1.0, 2.0)
