"""BOOT: the teacher's trajectory from a noise, learned step by step from its own start.

The signal of a state is y_t = (x_t - sigma_t eps) / alpha_t, eps the noise that its trajectory
began from: y = x0 at t = 0, and in y's ODE the noise cancels. The student g(eps, t) answers y_t in
one call for any t. With s the cleaner neighbour of t on a grid, and y_t = stopgrad g(eps, t):
    bootstrap  | g(eps, s) - y_s |^2,     y_s of one guided teacher step from x_t to s, which is
               y_t + (1 - l_s / l_t) (f(x_t, t) - y_t), l = sigma / alpha, f the teacher's x0
    boundary   | g(eps, 1) - f(eps, 1) |^2
No images: noise and prompts. Sampled in one step, at t = 0.
Source: Gu et al. 2023, arXiv:2306.05544, Sec. 3.
Differs from the paper: a teacher step is DDIM's, exact in l, not of first order; times lie on a
grid; the boundary is a share of the batch; and the student is told another time than t: a stock
scheduler reads x0 at the very time it tells, and near t = 0 an eps, v or flow network's x0 of pure
noise is that noise.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K grid intervals. t, s: (B,).

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase, Role, Setting
from stepdistill.core.path import VEPath, expand, full, rows
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec, Solver, teacher_step
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.boot_config import BOOTConfig, one_step
from stepdistill.methods.grid import SolverGrid, heun_step


class BOOT(Method[BOOTConfig]):
    """A one-step student bootstrapped along the teacher's trajectories, from prompts alone."""

    name = "boot"
    paper = "Gu et al. 2023, arXiv:2306.05544"
    Config = BOOTConfig
    guidance_options = ("guidance",)
    status = "trained on real data here"
    aliases = {"bootstrapping": {}}
    trainer = "ConsistencyTrainer"
    steps = (1,)
    digits = (
        Recipe("boot", {"method_config": {"guidance": 1.0, "num_grid": 10, "weight": "none"}}),
    )

    def __init__(self, config: BOOTConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        path, ve = setting.path, isinstance(setting.path, VEPath)
        from_noise = ve or setting.kind == "eps"
        first, last = config.told_times or ((1.0, 0.5) if from_noise else (0.5, 1.0))
        self.grid = SolverGrid(setting, config.num_grid, "none")
        # By grid point: 0 is clean data, K the start.
        even = torch.linspace(first, last, config.num_grid + 1, dtype=torch.float64)
        self.told, ends = path.snap(even), [0, config.num_grid]
        moved = bool(((self.told - even)[ends].abs() > 1e-6).any())
        if moved or len(set(self.told.tolist())) <= config.num_grid:
            raise ValueError(
                f"told_times: expected two times that the teacher knows and num_grid = "
                f"{config.num_grid} of them apart, got {first, last}. Table index n of N is "
                "(n + 1) / N; set them further apart, or a smaller num_grid."
            )
        if ve and first != 1.0:
            raise ValueError(
                "told_times: expected to begin at 1 on a VE path (sampling begins at sigma_max), "
                f"got {first, last}. Set [1.0, 0.5]."
            )

    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(), "student": Role(train=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, ("student",), reads_x0=False, reads_real=False),)

    def signal(self, nets: Nets, eps: Tensor, point: Tensor, cond: Cond) -> Tensor:
        """g (B, C, *S): the student's y at grid points (B,), of the trajectories from eps."""
        path, label_times = self.setting.path, self.told.to(eps.device)[point]
        # An EDM network scales its input by the noise level it is told: noise of that size.
        of_level = isinstance(path, VEPath)
        start = path.add_noise(0.0 * eps, eps, label_times) if of_level else path.prior(eps)
        return nets["student"](start, label_times, cond).x0

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """| g(eps, s) - stopgrad y_s |^2, weighted, in which a share of the samples stands at the
        start: there y is x0 of one step from pure noise to clean data."""
        config, path, bsz = self.config, self.setting.path, batch.bsz
        eps, index = ctx.randn((bsz, *batch.shape)), ctx.randint(0, config.num_grid, bsz)
        at_start = ctx.stratified(bsz) < config.boundary_share
        with torch.no_grad():
            y_t = self.signal(nets, eps, index + 1, batch.cond)
        t, s = self.grid.pair(index)
        x_t = torch.where(rows(at_start, eps), path.prior(eps), path.add_noise(y_t, eps, t))
        t, s = t.masked_fill(at_start, 1.0), s.masked_fill(at_start, 0.0)
        step: Solver = heun_step if config.solver == "heun" else teacher_step
        x_s = step(nets["teacher"], x_t, t, s, batch.cond, batch.null, config.guidance)
        alpha, sigma = (expand(c, x_s) for c in path.coeffs(s))
        y_s = (x_s - sigma * full(eps)) / alpha
        point = index.masked_fill(at_start, config.num_grid)
        error = squared_error(self.signal(nets, eps, point, batch.cond), y_s)
        loss = weighted_mean(error, self.weights(t, s, at_start))
        return Losses(loss, {"loss": loss.detach()})

    def weights(self, t: Tensor, s: Tensor, at_start: Tensor) -> Tensor:
        """(B,) factors on the squared errors at s after a step from t."""
        share, weight = self.config.boundary_share, torch.ones_like(t)
        if self.config.weight == "rate":
            (alpha_t, sigma_t), (alpha, sigma) = (self.setting.path.coeffs(u) for u in (t, s))
            weight = (1.0 - sigma * alpha_t / (alpha * sigma_t)) ** -2  # 1 at s = 0
        return weight * torch.where(at_start, self.config.boundary_weight / share, 1 / (1 - share))

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """One step. Errors: ValueError for another number."""
        one_step(1 if num_steps is None else num_steps)
        times = (float(self.told[0]),)
        return SamplerSpec(times, trained_times=times)
