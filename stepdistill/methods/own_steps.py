"""Methods that tune a distilled model at its own scheduler's steps, against itself as it was."""

from __future__ import annotations

from typing import Generic, TypeVar

from stepdistill.core.method import Method, MethodConfig, Role, Setting
from stepdistill.core.solvers import SamplerSpec

C = TypeVar("C", bound=MethodConfig)


class OwnSteps(Method[C], Generic[C]):
    """Its student takes the steps of the model's folder, as many as its config says, no others."""

    trainer = "PreferenceTrainer"
    any_student = False

    def __init__(self, config: C, setting: Setting) -> None:
        super().__init__(config, setting)
        self.spec = setting.own_sampler(self.num_steps)

    @property
    def num_steps(self) -> int:
        """Of the model and its student."""
        steps: int = getattr(self.config, self.steps_option)
        return steps

    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(), "student": Role(train=True)}

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """The model's own scheduler at its own steps. Errors: ValueError for other steps."""
        if num_steps not in (None, self.num_steps):
            raise ValueError(
                f"num_steps: expected {self.num_steps}, the tuned model's, got {num_steps}."
            )
        return self.spec
