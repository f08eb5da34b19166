"""Guidance distillation into an adapter, then progressive halving of the steps.

Stage 1: one conditional pass equals the guided teacher, out_student(x_t, t, c) = null + g (cond -
null), for one g or for a g the student is told. The teacher is the student's base with its adapter
off: one network in memory. Rounds after it halve the steps: the student's step from u to u - 1/N
learns where two steps of the finished student of the round before lead. Without guidance, stage 1
is teacher score matching of a student of other sizes (Song et al. 2024, arXiv:2410.23274).
Sources: Meng et al. 2022, arXiv:2210.03142; Salimans & Ho 2022, arXiv:2202.00512; Golnari 2023,
arXiv:2312.06899 (LoRA, one fixed g).
Differs from the papers: the embedding of g starts at zero; states on the teacher's own trajectory
are offered; at t = 1 the student sees pure noise, as in sampling.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, u, s: (B,).

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Method, Nets, Phase, Role, Setting
from stepdistill.core.path import VPPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import shift_times, snapped_grid
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.halving import Answers, halving_loss, roll_out
from stepdistill.methods.lora_guidance_config import DIGITS, LoRAGuidanceConfig


class LoRAGuidance(Method[LoRAGuidanceConfig]):
    """Guidance folded into the student, then fewer steps."""

    name = "lora_guidance"
    paper = "Golnari 2023, arXiv:2312.06899; Meng et al. 2022, arXiv:2210.03142"
    Config = LoRAGuidanceConfig
    guidance_options = ("guidance_range", "guidance", "embed_guidance")
    status = "trained on real data here"
    aliases = {
        "guidance_distillation": {},
        "teacher_score_matching": {"guidance": 1.0, "guidance_stage": True, "num_steps": ()},
        "progressive": {"num_steps": (32, 16, 8, 4), "anneal": True},
    }
    trainer = "LoRADistillationTrainer"
    data = "images"
    digits = (DIGITS,)

    def __init__(self, config: LoRAGuidanceConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        config.check_kind(setting.kind)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond"} if self.config.states == "trajectory" else {"x0", "cond"})

    def roles(self) -> dict[str, Role]:
        config = self.config
        extra = ("w",) if config.embed_guidance else ()
        roles = {"teacher": Role(), "student": Role(train=True, extra_inputs=extra)}
        if len(config.stages) > 1:  # each round's teacher: `resets` makes it the student's copy
            roles["target"] = Role(ema_of="student", extra_inputs=extra)
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, trains=("student",)),)

    def resets(self, step: int, max_steps: int) -> tuple[str, ...]:
        """The student where a new stage begins; `target` follows it, so it becomes its copy."""
        stage_of = self.config.stage_of
        switches = step > 0 and stage_of(step, max_steps) > stage_of(step - 1, max_steps)
        return ("student",) if switches else ()

    def learning_rate_scale(self, step: int, max_steps: int, role: str) -> float:
        return self.config.rate_scale(step, max_steps)

    def check_student(self, begins_as_teacher: bool) -> None:
        if begins_as_teacher:
            self.config.check_own_student()

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The loss of the stage that this step belongs to."""
        config, stage = self.config, self.config.stage_of(ctx.step, ctx.max_steps)
        g: float | Tensor = config.guidance
        w = None
        if config.guidance_range is not None:
            low, high = config.guidance_range
            g = low + (high - low) * ctx.rand(batch.bsz)
            w = (g - 1.0).float()

        def teach(x_t: Tensor, t: Tensor) -> Prediction:
            if stage == 0:
                return nets["teacher"](x_t, t, batch.cond, batch.null, g)
            return nets["target"](x_t, t, batch.cond, w=w)

        def student(x_t: Tensor, t: Tensor) -> Prediction:
            return nets["student"](x_t, t, batch.cond, w=w)

        steps = config.stages[stage]
        if steps:
            total = halving_loss(config, self.setting, steps, teach, student, batch, ctx)
        else:
            total = self.guidance_loss(teach, student, batch, ctx)
        return Losses(total, {"loss": total.detach(), "stage": torch.tensor(float(stage))})

    def guidance_loss(self, teach: Answers, student: Answers, batch: Batch, ctx: Ctx) -> Tensor:
        """| student(x_t, c) - guided teacher |^2, Meng et al. Eq. 1 with weights by `loss_on`."""
        path, kind = self.setting.path, self.config.loss_on
        if self.config.states == "data":
            assert batch.x0 is not None, "the trainer checks `needs`"
            if isinstance(path, VPPath):  # uniform over the table's entries
                t = ctx.randint(1, path.num_steps + 1, batch.bsz).double() / path.num_steps
            else:
                t = shift_times(1.0 - ctx.rand(batch.bsz), self.setting.shift)
            x_t = path.noised(batch.x0, ctx.randn(tuple(batch.x0.shape)), t)
        else:  # a uniform end on all ranks, reached in steps of at most 1 / trajectory_steps
            end = 1.0 - ctx.shared_rand()
            count = math.ceil((1.0 - end) * self.config.trajectory_steps)
            even = torch.linspace(1.0, end, count + 1, dtype=torch.float64)
            times: list[float] = path.snap(shift_times(even, self.setting.shift)).tolist()
            x_t, t = roll_out(path, teach, times, batch, ctx), ctx.times(times[-1], batch.bsz)
        with torch.no_grad():
            target = teach(x_t, t)
        pred = student(x_t, t)
        views = [p.raw if kind == "raw" else p.as_type(kind) for p in (pred, target)]
        return weighted_mean(squared_error(*views))

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """The teacher's scheduler at its steps; after halving, the last round's grid alone."""
        return self._sampler(self.config.stages[-1], num_steps)

    def sampler_at(self, step: int, max_steps: int, num_steps: int | None = None) -> SamplerSpec:
        """See Method.sampler_at: that of the stage reached."""
        stage = self.config.stage_of(step - 1 if step else max_steps, max_steps)
        return self._sampler(self.config.stages[stage], num_steps)

    def _sampler(self, last: int, num_steps: int | None) -> SamplerSpec:
        config = self.config
        w = config.guidance - 1.0 if config.embed_guidance else None
        if last and num_steps not in (None, last):
            raise ValueError(f"num_steps: expected {last}, the last round's, got {num_steps}.")
        count = last or num_steps or config.teacher_steps
        times = snapped_grid(self.setting.path, count, self.setting.shift)
        if not last:
            return SamplerSpec(times, "ode", w=w, keeps_scheduler=True)
        return SamplerSpec(times, "ode", trained_times=times, w=w)
