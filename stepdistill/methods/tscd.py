"""Trajectory-segmented consistency distillation (TSCD, of Hyper-SD).

The time axis is cut into k segments; the student learns to jump from any grid time to any cleaner
grid time of the same segment, against the guided teacher's own trajectory. k falls by stages, 8, 4,
2, 1, each starting from the student of the one before. k = 1 is trajectory consistency (TCD): one
student for any number of steps.
Source: Ren et al. 2024, arXiv:2404.13686, Sec. 3.1; TCD: Zheng et al. 2024, arXiv:2402.19159.
Differs from the paper: edges stand in index space (see segments.py); the original teacher stays the
solver at every stage, which the paper leaves open; the adversarial term compares noised jumps.
"""

# Shapes: B batch.

from __future__ import annotations

from stepdistill.core.context import Ctx
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.methods.any_end import AnyEnd
from stepdistill.methods.digits import jumps
from stepdistill.methods.tscd_config import TSCDConfig

# Most of the digits' run belongs to the last stage, whose one segment any number of steps crosses.
STAGES = {"loss": "l2", "segments": [8, 4, 2, 1], "stage_starts": [0.05, 0.12, 0.25]}


class TSCD(AnyEnd[TSCDConfig]):
    """Jumps to any end within a segment; segments merge stage by stage."""

    name = "tscd"
    paper = "Ren et al. 2024, arXiv:2404.13686"
    Config = TSCDConfig
    status = "trained on real data here"
    aliases = {
        "hyper_sd": {},
        "tcd": {"segments": (1,), "stage_starts": None, "sampler": "tcd"},
    }
    trainer = "TrajectorySegmentedTrainer"
    data = "images"
    one_student = True
    digits = (
        Recipe("tscd", jumps(1500, **STAGES)),
        Recipe(
            "tscd_one_lora",
            jumps(1500, **STAGES, sampler="tcd", gamma=0.3),
            steps=(1, 2, 4, 8),
            layouts=("lora",),
        ),
        Recipe(
            "tcd",
            jumps(1500, loss="l2", segments=[1], sampler="tcd", gamma=0.3),
            steps=(1, 2, 4, 8),
        ),
    )

    def num_segments(self, step: int, max_steps: int) -> int:
        return self.config.segments[self.config.stage_of(step, max_steps)]

    def weights(self, ctx: Ctx) -> tuple[float, float]:
        return self.config.weights(self.config.stage_of(ctx.step, ctx.max_steps))

    def resets(self, step: int, max_steps: int) -> tuple[str, ...]:
        """All trained roles where a new stage begins."""
        stage_of = self.config.stage_of
        if step == 0 or stage_of(step, max_steps) == stage_of(step - 1, max_steps):
            return ()
        return ("student", *self.config.gan.roles())

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Grid times that stop at every edge of the last stage's segments.

        Errors: ValueError for a num_steps that would cross one.
        """
        return self.spec(self.config.segments[-1], num_steps)

    def sampler_at(self, step: int, max_steps: int, num_steps: int | None = None) -> SamplerSpec:
        """See Method.sampler_at: the edges of the stage reached, and k steps where its own number
        would cross one."""
        last = step - 1 if step else max_steps
        return self.spec(self.num_segments(last, max_steps), num_steps)
