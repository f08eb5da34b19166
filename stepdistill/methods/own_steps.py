"""Methods that tune a distilled model at its own scheduler's steps, against itself as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, TypeVar

import torch
from pydantic import model_validator

from stepdistill.core.method import Method, MethodConfig, Role, Setting
from stepdistill.core.solvers import SamplerSpec


class OwnStepsConfig(MethodConfig):
    """Base of their options, which have num_steps."""

    call_times: tuple[float, ...] | None = None
    """Those steps' times in (0, 1], descending, of a model whose call is told them (DMD2's SDXL:
    timesteps 999, 749, 499, 249, which are 1, 0.75, 0.5, 0.25); none: its scheduler knows them."""

    @model_validator(mode="after")
    def _check_call_times(self) -> OwnStepsConfig:
        times, steps = self.call_times, getattr(self, "num_steps", 0)
        if times is None:
            return self
        falling = all(a > b for a, b in zip((1.0 + 1e-9, *times), (*times, 0.0), strict=True))
        if len(times) != steps or not falling:
            raise ValueError(
                f"call_times: expected {steps} descending times in (0, 1], one for each of "
                f"num_steps, got {list(times)}."
            )
        return self


C = TypeVar("C", bound=OwnStepsConfig)


class OwnSteps(Method[C], Generic[C]):
    """Its student takes the steps of the model's folder, as many as its config says, no others."""

    trainer = "PreferenceTrainer"
    any_student = False

    def __init__(self, config: C, setting: Setting) -> None:
        super().__init__(config, setting)
        self.spec = setting.own_sampler(self.num_steps)
        if config.call_times is not None:
            asked = torch.tensor(config.call_times, dtype=torch.float64)
            times = tuple(setting.path.snap(asked).tolist())
            self.spec = replace(self.spec, times=times, trained_times=times, keeps_scheduler=False)

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
