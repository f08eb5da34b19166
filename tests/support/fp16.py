"""Training in float16 on a CPU: torch's own autocast and gradient scaler.

Accelerate makes neither there: mixed_precision fp16 is CUDA's.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from stepdistill.trainers import DistillationTrainer


def in_fp16(trainer: DistillationTrainer, **scaling: Any) -> DistillationTrainer:
    """The trainer with its forward under autocast and a scaler (of these options) around AdamW."""
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 8.0, **scaling})
    bare, forward = trainer.optimizer.optimizer, trainer.module.forward
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(bare, scaler=scaler)
    trainer.accelerator.unscale_gradients = lambda _optimizer: scaler.unscale_(bare)  # type: ignore[method-assign]

    def half(*args: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            return forward(*args)

    trainer.module.forward = half
    return trainer
