"""Consistency distillation (CD) and latent consistency models (LCM, LCM-LoRA).

f(x_t, t) jumps from any point of the teacher's trajectory to its clean end. With x_s one guided
teacher step from x_t along a grid:  loss = d( f_student(x_t, t), stopgrad f_target(x_s, s) ).
Sources: Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378 and 2311.05556;
Geng et al. 2024 (ECT), arXiv:2406.14548; Lee et al. 2024 (TCM), arXiv:2410.14895.
Differs from the papers: guidance is g of null + g (cond - null), where LCM's w = g - 1; LPIPS
judges decoded images; at t = 1 the student sees pure noise, as in sampling.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase, Role, ScorerSpec, Setting, Status
from stepdistill.core.path import VPPath, rows
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec, Solver, teacher_step
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.methods.digits import ECT, SOON, UNGUIDED, jumps
from stepdistill.methods.grid import SolverGrid, heun_step
from stepdistill.methods.perceptual import pair_distance


class Consistency(Method[ConsistencyConfig]):
    """Self-consistency along the guided teacher's trajectory, over a fixed grid of times."""

    name = "consistency"
    paper = "Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378"
    Config: ClassVar[type[ConsistencyConfig]] = ConsistencyConfig
    guidance_options = ("guidance_range", "embed_guidance")
    status: ClassVar[Status] = "trained on real data here"
    aliases = {
        "cd": {"solver": "heun", **UNGUIDED},
        "ct": {"solver": "data", **UNGUIDED},
        "lcm": {"loss": "huber"},
        "lcm_lora": {"loss": "huber", "target": "self"},
        "ect": {**ECT, "shrink": {}},
        "tcm": {**ECT, "shrink": {"truncate_at": 1.0, "q": 1000.0, "stages": 1}},
    }
    trainer = "ConsistencyTrainer"
    data = "images"
    one_student = True
    digits: ClassVar[tuple[Recipe, ...]] = (
        Recipe("consistency", jumps(1200, **SOON)),
        Recipe("ect", jumps(1200, **ECT, shrink={})),
    )

    def __init__(self, config: ConsistencyConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.grid = self._grid(config.num_grid)

    def _grid(self, intervals: int) -> SolverGrid:
        config = self.config
        return SolverGrid(self.setting, intervals, config.boundary, config.timestep_scaling)

    def grid_at(self, step: int) -> SolverGrid:
        """The grid of student update `step`: the sampler's own unless it grows (CT)."""
        if self.config.growth is None:
            return self.grid
        intervals = self.config.growth.intervals(step, self.config.num_grid)
        if isinstance(path := self.setting.path, VPPath):  # a table has but its divisors
            intervals = next(n for n in range(intervals, 0, -1) if path.num_steps % n == 0)
        return self._grid(intervals)

    def roles(self) -> dict[str, Role]:
        extra = ("w",) if self.config.embed_guidance else ()
        teacher = {} if self.config.solver == "data" else {"teacher": Role()}
        roles = {"student": Role(train=True, extra_inputs=extra), **teacher}
        if self.config.target == "ema":
            roles["target"] = Role(ema_of="student", extra_inputs=extra)
        if self.config.truncated:  # never updated: the student that this run began with
            roles["reference"] = Role(ema_of="student", extra_inputs=extra)
        return roles

    def scorers(self) -> dict[str, ScorerSpec]:
        return {"lpips": self.config.lpips.spec} if self.config.loss == "lpips" else {}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, trains=("student",)),)

    def after(self, nets: Nets, step: int) -> None:
        if self.config.target == "ema":
            nets.ema_update("target", self.config.target_decay(step))

    def solver(self, ctx: Ctx) -> Solver:
        """The step of the (guided) teacher from x_t to its cleaner neighbour x_s."""
        return heun_step if self.config.solver == "heun" else teacher_step

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        return self.compare(nets, batch, ctx)[0]

    def compare(self, nets: Nets, batch: Batch, ctx: Ctx) -> tuple[Losses, Tensor]:
        """d( f_student(x_t, t), stopgrad f_target(x_s, s) ) and f_student (B, C, *S)."""
        config, x0 = self.config, batch.x0
        assert x0 is not None, "the trainer checks `needs`"
        grid, path, weight, w = self.grid_at(ctx.step), self.setting.path, None, None
        if config.shrink is None:
            t, s = grid.pair(ctx.randint(0, len(grid.starts), batch.bsz))
        else:
            t, s = config.shrink.pair(ctx, batch.bsz, path, grid.end)
            weight = config.shrink.weights(path, t, s)
        g = ctx.between(config.guidance_range, batch.bsz)
        if config.embed_guidance:
            w = torch.as_tensor(g, dtype=torch.float32, device=t.device).expand(batch.bsz) - 1.0
        noise = ctx.randn(tuple(x0.shape))
        x_t = path.noised(x0, noise, t)
        estimate = grid.blend(nets["student"](x_t, t, batch.cond, w=w))
        if config.solver == "data":  # the same x0 and noise
            x_s = path.add_noise(x0, noise, s)
        else:
            x_s = self.solver(ctx)(nets["teacher"], x_t, t, s, batch.cond, batch.null, g)
        with torch.no_grad():
            name = "target" if config.target == "ema" else "student"
            target = grid.blend(nets[name](x_s, s, batch.cond, w=w))
            if config.shrink is not None and config.truncated:
                below = rows(s < config.shrink.edge(path, s) - 1e-9, target)
                frozen = grid.blend(nets["reference"](x_s, s, batch.cond, w=w))
                target = torch.where(below, frozen, target)
        values = pair_distance(nets, config.loss, estimate, target, config.huber_c)
        total = values.mean() if weight is None else (weight.to(values.dtype) * values).mean()
        return Losses(total, {"loss": total.detach()}), estimate

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """x0 then fresh noise, at the times the stock LCMScheduler visits of this grid."""
        return self._sampler(self.grid, self.config.num_steps if num_steps is None else num_steps)

    def sampler_at(self, step: int, max_steps: int, num_steps: int | None = None) -> SamplerSpec:
        """See Method.sampler_at: on the grid reached, in as many steps as it has at most."""
        grid = self.grid_at(step - 1) if step else self.grid
        default_steps = min(self.config.num_steps, len(grid.starts))
        return self._sampler(grid, default_steps if num_steps is None else num_steps)

    def _sampler(self, grid: SolverGrid, num_steps: int) -> SamplerSpec:
        return SamplerSpec(
            grid.visit(num_steps),
            "renoise",
            trained_times=tuple(grid.starts.flip(0).tolist()),
            w=self.config.inference_guidance - 1.0 if self.config.embed_guidance else None,
            boundary_scale=grid.scale,
            boundary_sigma=grid.sigma_min,
        )
