"""Who is compared, by names and step counts, and what a budget says."""

import pytest

from stepdistill.cli import _demo_teacher
from stepdistill.cli._demo_teacher import DemoTeacher
from stepdistill.comparison.budget import Budget
from stepdistill.comparison.students import (
    StepsServed,
    Student,
    left_out,
    served_by_recipes,
    students,
)
from stepdistill.comparison.user_options import bundled, split_methods
from stepdistill.config.recipes import recipes
from stepdistill.core.method import COMMON_DATA
from stepdistill.demo.emoji.subject import EmojiSubject
from stepdistill.demo.subject import Digits
from stepdistill.methods import METHODS


def test_every_claim_of_every_recipe_is_judged_once() -> None:
    judged = [(one.recipe, steps) for one in students(served_by_recipes()) for steps in one.steps]
    claimed = [(name, steps) for name, recipe in recipes().items() for steps in recipe.claims]
    assert sorted(judged) == sorted(claimed)


def test_one_student_serves_all_step_counts_where_its_method_says_so() -> None:
    served = {
        "a": StepsServed((1, 2, 4), True, "images"),
        "b": StepsServed((1, 2, 4), False, "prompts"),
    }
    made = students(served, [1, 2])
    assert made == [Student("a", (1, 2)), Student("b", (1,)), Student("b", (2,))]


def test_a_one_step_method_is_asked_for_one_step_alone() -> None:
    served = StepsServed((1,), False, "prompts")
    assert served.of([1, 2, 8], only_claims=False) == (1,)
    assert StepsServed((2, 4), False, "images").of([1, 2, 8], only_claims=False) == (2, 8)
    assert StepsServed((2, 4), False, "images").of([1, 2, 8], only_claims=True) == (2,)


def test_every_method_is_known_with_its_data() -> None:
    """But for what learns from preferences or low resolutions, which the digits have none of."""
    every = {name: StepsServed.of_method(cls) for name, cls in METHODS.items()}
    served = {name: one for name, one in every.items() if one.data in COMMON_DATA}
    assert {name: served_by_recipes()[name] for name in served} == served
    assert every.keys() - served.keys() == every.keys() - served_by_recipes().keys()


def test_lcm_is_the_demo_s_consistency(tmp_path) -> None:
    made = DemoTeacher(tmp_path, Digits()).students(["lcm", "dmd2"], [1, 4])
    assert [one.name for one in made] == ["consistency_1_4", "dmd2_1", "dmd2_4"]


def test_an_unknown_method_is_refused_with_the_choices(tmp_path) -> None:
    choices = r"methods: expected a method of \['add', 'boot', 'consistency'.*'lcmm'"
    with pytest.raises(ValueError, match=choices):
        DemoTeacher(tmp_path, Digits()).students(["lcmm"], None)
    with pytest.raises(ValueError, match="methods: expected a method of"):
        split_methods(["lcmm"])


def test_a_method_of_one_s_own_file_keeps_its_name(tmp_path) -> None:
    assert bundled("lcm").name == "lcm.yaml"
    assert bundled("reflow").name == "reflow_distill.yaml"  # in place of its first stage's
    assert bundled("mine") is None
    assert split_methods(["lcm", "mine=a.yaml"]) == {"lcm": None, "mine": "a.yaml"}


@pytest.mark.parametrize(
    ("text", "budget"),
    [("240s", Budget(seconds=240.0)), ("0.5s", Budget(seconds=0.5)), ("5steps", Budget(updates=5))],
)
def test_a_budget_is_of_time_or_of_updates(text, budget) -> None:
    assert Budget.parse(text) == budget
    assert str(budget) == text


@pytest.mark.parametrize("text", ["240", "s", "0s", "-3steps", "4m"])
def test_another_budget_is_refused(text) -> None:
    with pytest.raises(ValueError, match="budget: expected such as 240s or 500steps"):
        Budget.parse(text)


def test_a_method_that_none_of_the_step_counts_suits_is_named(tmp_path) -> None:
    setup = DemoTeacher(tmp_path, Digits())
    names = ["vsd", "dmd2", "pcm"]
    chosen = setup.students(names, [4])
    assert left_out(setup.steps_served(names), chosen) == {"vsd": "is asked for 1 step alone"}


def test_heads_on_a_pixel_network_get_one_of_the_training_images(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        _demo_teacher, "train_features", lambda *where: seen.append(where) or "made"
    )
    setup = DemoTeacher(tmp_path, Digits())
    student = Student("add", (4,))
    setup.check_settings(student)
    (training,) = setup.trainings(student)
    equipped = setup.equipped(training)
    assert seen == [(tmp_path / "data", tmp_path / "features")]
    options = equipped.lasting(10)["method_config"]
    assert options["gan"]["pixels"] == {"network": "made"}
    assert not equipped.lacks_network
    assert setup.equipped(equipped) == equipped
    (other,) = setup.trainings(Student("ladd", (4,)))
    assert setup.equipped(other) == other


def test_rewards_are_judged_by_the_subject_s_own_scorers(tmp_path) -> None:
    setup = DemoTeacher(tmp_path, EmojiSubject())
    (_, feedback), (_, online) = (
        setup.trainings(Student(name, (4,))) for name in ("feedback", "online_preference")
    )
    kinds = [reward["kind"] for reward in setup.equipped(feedback).settings["rewards"]]
    assert kinds == ["emoji", "emoji_held_out"]
    assert setup.equipped(online).settings["method_config"]["reward"] == {"kind": "emoji"}
    digits = DemoTeacher(tmp_path, Digits())
    assert digits.equipped(feedback) == feedback
