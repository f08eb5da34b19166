"""What each process of a two-process test runs: train, then rank 0 writes weights and world size.

Usage: distributed.py TEACHER OUTPUT_DIR BATCH CASE LAYOUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.runs import build_trainer


def main(teacher: str, output_dir: str, batch: str, case: str, layout: str) -> None:
    torch.set_num_threads(1)
    out = Path(output_dir)
    trainer = build_trainer(
        case,
        Path(teacher),
        layout,
        out,
        max_train_steps=3,
        train_batch_size=int(batch),
        gradient_accumulation_steps=2,
        ema_decay=0.9,
    )
    logs = trainer.train()
    accelerator = trainer.accelerator
    rank = accelerator.process_index
    state = {
        f"{role}/{name}": value
        for role in trainer.bank.roles
        for name, value in trainer.bank.role_state(role).items()
        if trainer.bank.members(role)
    }
    save_file(state, out / f"rank{rank}.safetensors")
    facts = {"world_size": accelerator.num_processes, "logs": logs}
    (out / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
