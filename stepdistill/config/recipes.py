"""The runs that methods' recipes describe: settings as files for `stepdistill train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stepdistill.config.files import method_config
from stepdistill.config.layers import merge
from stepdistill.config.method_names import resolve_method
from stepdistill.core.method import COMMON_DATA, Data, Method
from stepdistill.core.recipe import First, Recipe
from stepdistill.methods import METHODS
from stepdistill.methods.gan import GANConfig

# Options that count student updates: they keep their share of a run that is longer or shorter.
COUNTED_OPTIONS = (
    *("anneal_steps", "clean_first", "warm_start.updates", "warmup_steps"),
    *("record_updates", "backtrack_updates"),
)

COMMON: dict[str, Any] = {
    "train_batch_size": 64,
    "learning_rate": 1e-3,
    "role_learning_rates": {},
    "lr_scheduler": "cosine",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 100.0,
    "ema_decay": 0.98,
    "checkpointing_steps": 0,
    "logging_steps": 5,
    "max_train_steps": 1000,
    "tuning": {"student": "full", "fake": "full"},
}
# An adapter of 183k parameters' projections and convolutions wants twice the rate of full tuning.
LORA: dict[str, Any] = {
    "tuning": {"student": "lora", "fake": "lora", "rank": 16, "alpha": 16},
}


@dataclass(frozen=True)
class Training:
    """One `stepdistill train`. settings: its config file's content, max_train_steps included.

    share: of the student's time budget. starts_from: the teacher, the student of the training
    before (init_student_from), or that one's export as the model, teacher and student alike.
    """

    label: str
    settings: Mapping[str, Any]
    data: Data
    share: float = 1.0
    starts_from: Literal["teacher", "student", "model"] = "teacher"

    @property
    def lacks_network(self) -> bool:
        """Whether its heads read a pixel network that the settings don't name."""
        options = self.settings.get("method_config", {})
        gan = getattr(method_config(self.settings["method"], options), "gan", None)
        if not isinstance(gan, GANConfig) or not gan.scorers():
            return False
        return gan.pixels.network is None

    def describe(self) -> str:
        """Batch and rates in a few words."""
        rates = {"student": self.settings["learning_rate"], **self.settings["role_learning_rates"]}
        rates_text = ", ".join(f"{role} {rate:g}" for role, rate in rates.items())
        return f"batch {self.settings['train_batch_size']}, learning rates {rates_text}"

    def with_network(self, folder: str | Path) -> Training:
        """The same with that pixel network."""
        named = {"method_config": {"gan": {"pixels": {"network": str(folder)}}}}
        return replace(self, settings=merge(self.settings, named))

    def with_judges(self, kinds: Mapping[str, str]) -> Training:
        """The same with its rewards' kinds of scorers replaced by others, by name."""

        def replaced(reward: Mapping[str, Any]) -> dict[str, Any]:
            return {**reward, "kind": kinds.get(reward["kind"], reward["kind"])}

        settings = dict(self.settings)
        if rewards := settings.get("rewards"):
            settings["rewards"] = [replaced(one) for one in rewards]
        if reward := settings.get("method_config", {}).get("reward"):
            settings = merge(settings, {"method_config": {"reward": replaced(reward)}})
        return replace(self, settings=settings)

    def lasting(self, updates: int) -> dict[str, Any]:
        """The settings of a run of that many student updates."""
        options = dict(self.settings.get("method_config", {}))
        for name in COUNTED_OPTIONS:
            group, _, last = name.rpartition(".")
            count = (options.get(group) or {}) if group else options
            if count := count.get(last):
                scaled = max(1, round(count / self.settings["max_train_steps"] * updates))
                options = merge(options, {group: {last: scaled}} if group else {last: scaled})
        return merge(self.settings, {"max_train_steps": updates, "method_config": options})


@dataclass(frozen=True)
class MethodRecipe:
    """A recipe with the method it stands on. student: "full" or "lora"."""

    method: type[Method[Any]]
    recipe: Recipe
    student: str = "full"

    @property
    def claims(self) -> tuple[int, ...]:
        """The step counts it is meant for."""
        return self.recipe.steps or self.method.steps

    @property
    def needs_pairs(self) -> bool:
        first = self.recipe.first
        return "pairs" in {self.method.data, *([METHODS[first.method].data] if first else [])}

    def with_first(self, change: Callable[[First], First]) -> MethodRecipe:
        """The same with its first training changed, where it has one."""
        first = self.recipe.first
        changed = None if first is None else change(first)
        return replace(self, recipe=replace(self.recipe, first=changed))

    def settings(self, num_steps: int) -> dict[str, Any]:
        """The config file's content for a student of that many steps."""
        options = {"method_config": self.method.for_steps(num_steps)}
        made = merge(self._over_common(self.method.name, self.recipe.settings), options)
        return merge(made, self.recipe.by_steps.get(num_steps, {}))

    def _over_common(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        made = merge({**COMMON, "method": method}, settings)
        return as_lora(made) if self.student == "lora" else made

    def trainings(self, num_steps: int) -> list[Training]:
        """What trains a student of that many steps, in order."""
        settings, data, first = self.settings(num_steps), self.method.data, self.recipe.first
        if first is None or (num_steps > 1 and not first.always):
            return [Training(self.method.name, settings, data)]
        warm = self._over_common(first.method, first.settings)
        if first.always:
            options = METHODS[first.method].for_steps(num_steps)
            warm = merge(warm, {"method_config": options})
        before = Training(first.label, warm, METHODS[first.method].data, first.share)
        if first.share == 1.0:
            return [before]
        return [
            before,
            Training(self.method.name, settings, data, 1.0 - first.share, first.gives),
        ]


def recipes() -> dict[str, MethodRecipe]:
    """Every method's recipes by name; of one that states none, the common settings. Methods of
    other data than COMMON_DATA have none without stating it: nobody has judged a demo's images, and
    no demo's teacher enlarges any."""
    return {
        recipe.name: MethodRecipe(cls, recipe)
        for cls in METHODS.values()
        for recipe in cls.digits or ((Recipe(cls.name),) if cls.data in COMMON_DATA else ())
    }


def recipe_name(name: str) -> str:
    """The recipe of that name, or of the method that users call so. Errors: ValueError."""
    known = recipes()
    try:
        resolved = name if name in known else resolve_method(name)[0]
    except ValueError:
        resolved = ""
    if resolved not in known:
        raise ValueError(f"expected a method of {sorted(known)}, got {name!r}.")
    return resolved


def recipe_for(name: str, student: str) -> MethodRecipe:
    """The recipe of that name for a full or LoRA student. Errors: ValueError naming the choices."""
    try:
        made = recipes()[recipe_name(name)]
    except ValueError as err:
        raise ValueError(f"demo: {err}") from err
    if student not in made.recipe.layouts:
        raise ValueError(
            f"demo: expected a student of {made.recipe.layouts} with {name}, got {student!r}."
        )
    return MethodRecipe(made.method, made.recipe, student)


def as_lora(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with adapters in place of copies, at twice the learning rates."""
    rates = {role: 2 * rate for role, rate in settings["role_learning_rates"].items()}
    doubled = {"learning_rate": 2 * settings["learning_rate"], "role_learning_rates": rates}
    return merge(settings, {**LORA, **doubled})
