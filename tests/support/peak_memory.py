"""Peak memory of two training steps in a process of its own, above what the imports took.

Usage: peak_memory.py LAYOUT OUTPUT_DIR; prints JSON {"peak": bytes, "base": parameters}.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill import TrainConfig, Tuning
from stepdistill.families.sd import StableDiffusionFamily
from stepdistill.testing.tiny import TINY
from stepdistill.trainers import LoRADistillationTrainer
from support.runs import TinyData

# Stable Diffusion 1.5's UNet at half its width: 210 M parameters.
UNET = {
    "sample_size": 8,
    "block_out_channels": (160, 320, 640, 640),
    "cross_attention_dim": 384,
    "attention_head_dim": 8,
}


def main(layout: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    teacher = Path(output_dir) / "teacher"
    pipeline = TINY["sd"]()
    width = pipeline.unet.config.cross_attention_dim
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**UNET, "cross_attention_dim": width})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unet = unet.to_empty(device="cpu")
    for param in unet.parameters():  # random and small: outputs stay finite
        torch.nn.init.normal_(param, std=0.01)
    count = sum(p.numel() for p in unet.parameters())
    pipeline.register_modules(unet=unet)
    family = StableDiffusionFamily(pipeline)
    args = TrainConfig(
        output_dir=str(teacher.with_name("run")),
        max_train_steps=2,
        train_batch_size=1,
        checkpointing_steps=0,
        disable_progress_bar=True,
        tuning=Tuning(student=layout, rank=64),  # type: ignore[arg-type]
    )
    data = TinyData(family.sample_shape(), "prompt", ("x0",))
    trainer = LoRADistillationTrainer(family, args, data, method_config={"guidance": 7.5})
    trainer.save = lambda: teacher  # type: ignore[method-assign]  # a checkpoint is no training
    trainer.train()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    print(json.dumps({"peak": 1024 * (after - before), "base": count}))


if __name__ == "__main__":
    main(*sys.argv[1:])
