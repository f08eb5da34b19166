"""Every method has a recipe the demo can run, and each recipe is one its method accepts."""

import pytest

from stepdistill.config.files import method_config
from stepdistill.config.recipes import Training, recipe_for, recipes
from stepdistill.config.run import TrainConfig
from stepdistill.core.method import COMMON_DATA
from stepdistill.methods import METHODS

CASES = [
    (name, layout, steps)
    for name, made in recipes().items()
    for layout in made.recipe.layouts
    for steps in made.claims
]


def test_every_method_has_a_recipe() -> None:
    """But for what learns from preferences or low resolutions: nobody has judged the demo's images,
    and its teacher reads none."""
    judged = {c for c in METHODS.values() if c.data not in COMMON_DATA and not c.digits}
    assert {*METHODS.values()} - judged == {made.method for made in recipes().values()}
    for cls in judged:
        with pytest.raises(ValueError, match=rf"expected a method of .*, got '{cls.name}'"):
            recipe_for(cls.name, "full")


@pytest.mark.parametrize(("name", "layout", "steps"), CASES)
def test_settings_are_ones_the_method_accepts(name: str, layout: str, steps: int) -> None:
    for training in recipe_for(name, layout).trainings(steps):
        settings = dict(training.settings)
        method = settings.pop("method")
        options = method_config(method, settings.pop("method_config", {}))
        assert TrainConfig(**settings).tuning.student == layout
    told = getattr(options, METHODS[method].steps_option)
    assert (told[-1] if isinstance(told, tuple) else told) == steps


@pytest.mark.parametrize("name", recipes())
def test_shares_add_up_to_the_whole_budget(name: str) -> None:
    made = recipes()[name]
    for steps in made.claims:
        shares = [training.share for training in made.trainings(steps)]
        assert sum(shares) == pytest.approx(1.0)


def test_another_length_keeps_the_share_of_counted_options() -> None:
    settings = {"max_train_steps": 2000, "method_config": {"anneal_steps": 500}}
    made = Training("a", settings, "pairs").lasting(100)
    assert made == {"max_train_steps": 100, "method_config": {"anneal_steps": 25}}


def test_lora_doubles_the_rates_of_both_trainings() -> None:
    full, lora = recipe_for("dmd2", "full").trainings(1), recipe_for("dmd2", "lora").trainings(1)
    for before, after in zip(full, lora, strict=True):
        assert after.settings["learning_rate"] == 2 * before.settings["learning_rate"]


def test_a_student_a_recipe_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a student of \('full',\) with slimflow"):
        recipe_for("slimflow", "lora")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a method of"):
        recipe_for("lcmm", "full")
