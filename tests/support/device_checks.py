"""What a run must do alike on any device: the CPU in a default test, a GPU in tests/gpu.

Draws are made on the CPU for both, as generators of two devices give other numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.families.family import Family
from stepdistill.planning.blueprint import blueprint
from stepdistill.planning.costs import Forecast
from stepdistill.planning.forecast import forecast
from stepdistill.trainers import DistillationTrainer, trainer_class
from support.runs import build_trainer


@contextmanager
def on(device: str) -> Iterator[None]:
    """Within: Accelerate takes that kind of device."""
    AcceleratorState._reset_state(True)
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": str(device == "cpu").lower()}):
        yield
    AcceleratorState._reset_state(True)


@contextmanager
def host_draws() -> Iterator[None]:
    """Within: a loss draws on the CPU, whatever its device."""
    with patch.multiple(Ctx, **{n: _on_host(n) for n in ("randn", "rand", "stratified")}):
        yield


def _on_host(name: str) -> Any:
    real = getattr(Ctx, name)

    def draw(self: Ctx, *args: Any) -> Tensor:
        device, self.device = self.device, torch.device("cpu")
        try:
            drawn: Tensor = real(self, *args)
        finally:
            self.device = device
        return drawn.to(device)

    return draw


def gradients(
    device: str, case: str, teacher: Path, layout: str, folder: Path, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients of the student by name, on the CPU) of one update that is not made."""
    more: dict[str, Any] = {"max_train_steps": 1, "max_grad_norm": 1e9, **options}
    with on(device), host_draws():
        trainer = build_trainer(case, teacher, layout, folder, **more)
        assert trainer.device.type == device
        trainer.log.allows = lambda *_: False  # type: ignore[method-assign]
        logs = trainer.train()
        members = trainer.bank.members("student")
        found = {name: p.grad.float().cpu() for name, p in members.items() if p.grad is not None}
    return logs["loss/student"], found


def gradient_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|got - expected| / |expected| over all tensors together."""
    assert got.keys() == expected.keys() != set()
    squares = [
        ((got[name] - value).square().sum(), value.square().sum())
        for name, value in expected.items()
    ]
    off, size = (torch.stack(list(part)).sum() for part in zip(*squares, strict=True))
    return float((off / size).sqrt())


def fused_error(device: str) -> float:
    """Largest difference of fused AdamW's weights from a plain loop's, after five updates."""
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        sizes = ((3,), (64, 65), (7, 5, 3))
        params = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in sizes]
        optimizer = torch.optim.AdamW(params, lr=1e-2, fused=fused, foreach=False)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(device)
            optimizer.step()
        results.append(params)
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def random_weights(model: str, dtype: torch.dtype, device: str) -> Family:
    """A model that `plan` knows, or a folder's, at its true shapes; its weights say nothing."""
    family = blueprint(model, dtype)
    for part in family.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to_empty(device=device)
            with torch.no_grad():
                for value in (*part.parameters(), *part.buffers()):
                    if value.is_floating_point():
                        value.normal_(std=0.02)
                    else:
                        value.zero_()
                for name, value in part.named_buffers():
                    if name.endswith("position_ids"):
                        value.copy_(torch.arange(value.shape[-1], device=device).expand_as(value))
    family.pipeline.register_to_config(_name_or_path="random")
    return family


def held_and_peak(device: str, run: RunConfig) -> tuple[int, int | None, Forecast]:
    """(bytes of weights and moments, the allocator's peak or None on the CPU, the forecast) of two
    updates of a run on prompts."""
    plan = forecast(run)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    args = {name: getattr(run, name) for name in type(run).model_fields}
    with on(device):
        family = random_weights(run.pretrained_model_name_or_path, run.frozen_dtype, device)
        trainer = trainer_class(run.method)(
            family, _train_config(run, args), ["a photo"] * 4, run.method, run.method_config
        )
        trainer.train()
        held = _held(trainer)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return held, peak, plan


def _train_config(run: RunConfig, values: dict[str, Any]) -> Any:
    cls = next(c for c in type(run).__mro__ if c.__name__ == "TrainConfig")
    return cls(**{name: values[name] for name in cls.model_fields})


def _held(trainer: DistillationTrainer) -> int:
    parts = [p for p in trainer.family.pipeline.components.values() if isinstance(p, nn.Module)]
    tensors = {id(p): p for m in (trainer.bank, *parts) for p in (*m.parameters(), *m.buffers())}
    moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
    whole = (*tensors.values(), *(v for v in moments if isinstance(v, Tensor) and v.ndim))
    return sum(value.nbytes for value in whole)
