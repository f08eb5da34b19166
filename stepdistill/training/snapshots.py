"""Saving a trainer's state as checkpoint-N, and going on from one.

What a run is lies in the networks, the optimiser, the method's buffers and a position in the data;
random numbers are keyed by position and need no state.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.training import checks
from stepdistill.training.checkpoint import (
    load_checkpoint,
    newest_valid,
    prune,
    read_state,
    save_checkpoint,
)

if TYPE_CHECKING:
    from stepdistill.training.trainer import Trainer


def save_run(run: Trainer) -> Path:
    """Write checkpoint-STEP whole, then drop the oldest beyond the limit; returns its path."""
    folder = run.output_dir / f"checkpoint-{run.step}"
    run.log.check_finite()
    accelerator, args = run.accelerator, run.args
    log_state = run.log.state_dict()
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    if main or run.sharded:
        scaler = accelerator.scaler
        state = {
            "step": run.step,
            "batches_seen": run.batches_seen,
            "seconds": run.seconds,
            "world_size": accelerator.num_processes,
            "global_batch": accelerator.num_processes * args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "grad_scaler": scaler.state_dict() if scaler is not None else {},
            "facts": run.facts,
            "log": log_state,
        }
        buffers = run.method.state_dict()
        save_checkpoint(folder, run.bank, run.optimizer, buffers, state, run.sharded)
    if main:
        prune(folder, args.checkpoints_total_limit, run.log.watchdog.protected())
    accelerator.wait_for_everyone()
    return folder


def resume_run(run: Trainer, where: str) -> None:
    """Continue from a checkpoint folder or the newest whole one ("latest")."""
    folder: Path | None = Path(where)
    if where == "latest":
        folder, skipped = newest_valid(run.output_dir)
        for line in skipped:
            run.accelerator.print(f"resume: {line}")
        if folder is None:
            run.accelerator.print("resume: no whole checkpoint yet, starting at step 0")
            return
    assert folder is not None
    checks.resume_fits(read_state(folder), run.args, run.accelerator.num_processes, run.facts)
    restore_run(run, folder)
    run.accelerator.print(f"resume: continuing {folder.name} at step {run.step}")


def restore_run(run: Trainer, folder: Path) -> None:
    """Load a whole checkpoint, whatever number of processes saved it."""
    state = read_state(folder)
    run.method.load_state_dict(load_checkpoint(folder, run.bank, run.optimizer))
    if run.accelerator.scaler is not None and state["grad_scaler"]:
        run.accelerator.scaler.load_state_dict(state["grad_scaler"])
    run.step, run.batches_seen = state["step"], state["batches_seen"]
    run.seconds = state["seconds"]
    run.facts.setdefault("data", state["facts"].get("data"))
    run.log.load_state_dict(state.get("log", {}))
