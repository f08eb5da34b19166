"""The signs of a step over whole runs of a small network on a mixture of known modes.

Four classes of three modes each; teacher, student and fake are one small network, trained on the
mixture. Runs that end healthy are quiet at the default thresholds; vsd that draws one mode a class
is told. `test_watchdog_digits` has the same on images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from stepdistill.config.files import method_class, method_config
from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Method, Setting
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Batch, Cond
from stepdistill.monitoring.step_signs import SignChecks, StepSigns

pytestmark = pytest.mark.full
CLASSES, MODES, BSZ, LINE = 4, 3, 64, 10
ANGLES = torch.arange(CLASSES * MODES) * (2.0 * math.pi / (CLASSES * MODES))
MEANS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # (K, 2), a class's modes far apart
ORDER = torch.arange(CLASSES * MODES).view(MODES, CLASSES).T  # (class, mode) -> which mean


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.layers = nn.Sequential(
            nn.Linear(2 + 3 + CLASSES + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t = t.float()[:, None]
        told = nn.functional.one_hot(label, CLASSES + 1).float()
        return self.layers(torch.cat([x, t, torch.cos(3 * t), torch.sin(3 * t), told], 1))


class Role(Denoiser):
    """A Net as a denoiser that tells of its predictions."""

    def __init__(self, net: Net, name: str, nets: Nets) -> None:
        self.path, self.kind = FlowPath(), "flow"
        self.net, self.name, self.nets = net, name, nets

    def raw(self, x_t, t, cond, w, features):
        return self.net(x_t, t, cond["class"]), {}

    def __call__(self, *args, **kwargs):
        pred = super().__call__(*args, **kwargs)
        self.nets.signs.see(self.name, pred)
        return pred


class Nets:
    def __init__(self, teacher: Net, roles: Mapping[str, object]) -> None:
        self.signs = StepSigns()
        self.modules = {r: teacher if r == "teacher" else copy.deepcopy(teacher) for r in roles}
        for role, net in self.modules.items():
            net.requires_grad_(role in ("student", "fake"))

    def __getitem__(self, role: str) -> Role:
        return Role(self.modules[role], role, self)

    def ema_update(self, role: str, decay: float) -> None:
        for p, q in zip(
            self.modules[role].parameters(), self.modules["student"].parameters(), strict=True
        ):
            p.data.lerp_(q.data, 1.0 - decay)


def data(generator: torch.Generator, label: Tensor) -> Tensor:
    mode = torch.randint(0, MODES, (len(label),), generator=generator)
    return MEANS[ORDER[label, mode]] + 0.1 * torch.randn(len(label), 2, generator=generator)


@pytest.fixture(scope="module")
def teacher() -> Net:
    torch.manual_seed(0)
    net, generator = Net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(1500):
        label = torch.randint(0, CLASSES, (256,), generator=generator)
        x0, noise = data(generator, label), torch.randn(256, 2, generator=generator)
        t = torch.rand(256, generator=generator)
        null = torch.rand(256, generator=generator) < 0.1
        out = net((1 - t)[:, None] * x0 + t[:, None] * noise, t, label.where(~null, CLASSES))
        loss = (out - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def run(
    teacher: Net, name: str, seed: int, rates: tuple[float, float], updates: int, **options
) -> tuple[list[tuple[int, str]], float]:
    """([(update, check told)], the student's distance within a class over the data's)."""
    with torch.random.fork_rng():
        method: Method = method_class(name)(
            method_config(name, options), Setting(FlowPath(), "flow")
        )
    nets = Nets(teacher, method.roles())
    optimizers = {
        role: torch.optim.Adam(nets.modules[role].parameters(), rate, betas=(0.0, 0.99))
        for role, rate in zip(("student", "fake"), rates, strict=True)
        if role in nets.modules
    }
    generator, checks = torch.Generator().manual_seed(seed), SignChecks(WatchdogConfig(), LINE)
    told, sums, shown = [], {}, []
    for step in range(updates):
        carry: dict[str, object] = {}
        for phase in method.phases(step):
            for repeat in range(phase.repeat):
                label = torch.randint(0, CLASSES, (BSZ,), generator=generator)
                cond, null = Cond({"class": label}), Cond({"class": torch.full_like(label, 4)})
                batch = Batch(cond, null, (2,), data(generator, label))
                nets.signs = StepSigns()
                ctx = Ctx(seed, step, updates, phase.name, repeat, carry=carry)
                loss = phase.loss(nets, batch, ctx).total
                for trained in phase.trains:
                    optimizers[trained].zero_grad()
                loss.backward()
                for trained in phase.trains:
                    optimizers[trained].step()
                for key, value in nets.signs.logs(batch).items():
                    key = f"student/{key}"
                    sums[key] = sums.get(key, 0.0) + float(value) / LINE
        method.after(nets, step)
        if (step + 1) % LINE == 0:
            told += [(step + 1, check) for check in checks.bad(sums, (step + 1) / updates)]
            shown.append(dict(sums))
            sums = {}
    label = torch.arange(CLASSES).repeat_interleave(200)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        noise = torch.randn(len(label), 2, generator=draw)
        fresh = lambda _step: torch.randn(len(label), 2, generator=draw)  # noqa: E731
        spec = method.sampler()
        x0 = sample_x0(
            nets["student"], spec, noise, Cond({"class": label}), None, fresh_noise=fresh
        )
    within = (
        x0.view(CLASSES, 200, 2).var(1).mean()
        / data(draw, label).view(CLASSES, 200, 2).var(1).mean()
    )
    for kind in ("spread", "prompt_spread"):
        print(name, seed, kind, [
            round((s[f"student/x0_{kind}"] / s[f"student/teacher_{kind}"]) ** 0.5, 2)
            for s in shown if f"student/x0_{kind}" in s
        ])  # fmt: skip
    print(name, seed, "error", [
        round(s["student/fake_error"] / s["student/teacher_error"], 2)
        for s in shown if "student/fake_error" in s
    ])  # fmt: skip
    print(name, seed, "told", told[:3], "diversity", round(float(within) ** 0.5, 2), flush=True)
    return told, float(within) ** 0.5


SCORE = {"guidance": 1.0, "critic_steps": 2}
VSD = {**SCORE, "null_probability": 0.0, "warm_start": {"updates": 60, "teacher_steps": 8}}
HEALTHY = [
    *(("vsd", seed, (1e-3, 2e-3), VSD) for seed in range(5)),
    *(("dmd2", seed, (1e-3, 2e-3), SCORE) for seed in range(3)),
    *(("dmd2", seed, (1e-3, 2e-3), {k: VSD[k] for k in (*SCORE, "warm_start")})
      for seed in range(3, 5)),
    *(("dmd2", seed, (1e-3, 2e-3), {**SCORE, "num_steps": 4, "sampler": "ode",
                                    "trained_step": "last"}) for seed in range(5, 8)),
    *(("consistency", seed, (1e-3, 0.0), {"guidance_range": (1.0, 1.0), "target": "ema"})
      for seed in range(4)),
    *(("tscd", seed, (1e-3, 0.0), {"guidance_range": (1.0, 1.0)}) for seed in range(3)),
]  # fmt: skip


@pytest.mark.sampled_in_full(  # one of each kind
    *("vsd-1-rates1-options1", "dmd2-1-rates6-options6", "dmd2-4-rates9-options9"),
    *("dmd2-7-rates12-options12", "consistency-0-rates13-options13", "tscd-0-rates17-options17"),
)
@pytest.mark.parametrize(("name", "seed", "rates", "options"), HEALTHY)
def test_healthy_runs_are_quiet(teacher, name, seed, rates, options) -> None:
    told, diversity = run(teacher, name, seed, rates, 150, **options)
    assert diversity > 0.7
    assert told == []


@pytest.mark.parametrize("seed", range(3))
def test_vsd_that_draws_one_mode_a_class_is_told(teacher, seed) -> None:
    """No warm start, guidance 4.5, and one update of the fake for one of the student; stopped where
    it is narrowest."""
    told, diversity = run(teacher, "vsd", seed, (1e-3, 1e-3), 110, guidance=4.5)
    assert diversity < 0.5
    assert "spread" in {check for _, check in told}
