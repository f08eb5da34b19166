"""2-rectified flow++: one round of reflow is enough if it is trained well.

On pairs (noise, x0) of the teacher's ODE, with tau rectified-flow time, v = noise - x0, and tau
drawn where the work is, near both ends (density e^(a tau) + e^(a (1 - tau)), a = 4):
    none       huber(v_student, v)
    constant   (1 - tau) huber + LPIPS(x0_student, x0)           their config E
    inverse_t  (1 - tau) huber + LPIPS(x0_student, x0) / tau     their config F
Any premetric will do as pairs leave E[x0 | x_t] nearly deterministic; on unpaired data it biases.
The sampler keeps its first noise, x_s = (1 - s) x0 + s z: Euler where the field is straight.
A teacher's own preconditioning is kept (set-up wrapped): EDM's D gives v = (x - D) / tau.
Source: Lee et al. 2024, arXiv:2405.20320, and its released code.
Differs from the paper: LPIPS judges decoded latents; a line ends at the state that our sampler
starts from (NoisePath.line_to_prior), theirs at tau = 1 - 1e-5, sigma 1e5 of an EDM network.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, MethodConfig, Nets, Phase, Role, ScorerSpec
from stepdistill.core.path import NoisePath, flow_time, full
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import snapped_grid, u_shaped_times
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import sample_huber
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.digits import regression
from stepdistill.methods.grid import path_time


class RFPPConfig(MethodConfig):
    setup: Literal["wrapped", "raw"] = "wrapped"
    """wrapped: the teacher's path and prediction; raw: the output is velocity on a flow path."""
    sharpness: float = Field(default=4.0, gt=0)
    """a of the time law: how much of it lies near the ends."""
    t_range: tuple[float, float] = (1e-5, 1 - 1e-5)
    """Rectified-flow times the law is mapped onto; what the teacher does not reach is clamped to
    its ends: 0.028 and 0.936 of a VP table, sigma_min and sigma_max of EDM (0.002 and 80 / 81)."""
    huber_ratio: float = Field(default=0.00054, gt=0)
    """h / d of the pseudo-Huber distance, d the numbers of a sample."""
    perceptual: Literal["none", "constant", "inverse_t"] = "constant"
    """How LPIPS of x0 is weighed: not at all, by 1 (config E) or by 1 / tau (config F)."""
    lpips: LPIPSOptions = LPIPSOptions(resize=224, pooling="avg")
    """Options of LPIPS; released code: 224 px, average pooling."""
    sampler: Literal["anchored", "euler"] = "euler"
    """Steps beyond the first: anchored keeps the first noise; Euler's second step does, too."""
    heun: bool = False
    """Take each sampling step but the last anew with the mean flow of its ends: 2 N - 1 calls."""
    num_steps: int = Field(default=1, ge=1)
    """Sampling steps."""

    @model_validator(mode="after")
    def _check(self) -> RFPPConfig:
        if not 0 < self.t_range[0] < self.t_range[1] <= 1:
            raise ValueError(f"t_range: expected 0 < low < high <= 1, got {self.t_range}.")
        return self


class RFPP(Method[RFPPConfig]):
    """Reflow with end-heavy times, robust and perceptual losses, and an anchored sampler."""

    name = "rfpp"
    paper = "Lee et al. 2024, arXiv:2405.20320"
    Config = RFPPConfig
    status = "trained on real data here"
    aliases = {"rf++": {}, "rectified_flow++": {}}
    trainer = "ReflowTrainer"
    data = "pairs"
    one_student = True
    # No LPIPS: its network was made for photographs of 64 px and more.
    digits = (Recipe("rfpp", regression(perceptual="none")),)

    @property
    def path(self) -> NoisePath:
        """The student's own path, what `nets["student"].path` will be."""
        path = self.setting.path
        return path.as_flow() if self.config.setup == "raw" else path

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train=True, as_flow=self.config.setup == "raw")}

    def scorers(self) -> dict[str, ScorerSpec]:
        return {} if self.config.perceptual == "none" else {"lpips": self.config.lpips.spec}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, trains=("student",)),)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The loss of the chosen configuration on straight lines between the ends of the pairs."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        assert batch.noise is not None, "the trainer checks `needs`"
        config, student = self.config, nets["student"]
        path, x0 = student.path, full(batch.x0)
        law = u_shaped_times(ctx.rand(batch.bsz), config.sharpness, *config.t_range)
        t = path_time(path, law)
        x_t, end = path.line_to_prior(x0, batch.noise, t)
        pred = student(x_t, t, batch.cond)
        huber = sample_huber(pred.flow, end - x0, config.huber_ratio)
        logs = {"huber": huber.mean().detach()}
        if config.perceptual == "none":
            return Losses(huber.mean(), logs)
        with torch.no_grad():
            reference = nets.images(x0)
        lpips = nets.scorer("lpips")(nets.images(pred.x0), reference)
        logs["lpips"] = lpips.mean().detach()
        tau = flow_time(path, t).to(huber.dtype)
        scale = 1.0 / tau if config.perceptual == "inverse_t" else torch.ones_like(tau)
        total = ((1.0 - tau) * huber + scale * lpips).mean()
        return Losses(total, {"loss": total.detach(), **logs})

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """The uniform grid; both samplers begin alike, with Euler's first step, and end alike."""
        times = snapped_grid(self.path, num_steps or self.config.num_steps)
        anchored = self.config.sampler == "anchored" and len(times) > 2
        heun = self.config.heun and len(times) > 1
        return SamplerSpec(times, "anchored" if anchored else "ode", heun=heun)
