"""Saving a trainer's state as checkpoint-N, and going on from one.

What a run is lies in the networks, the optimiser, the method's buffers and a position in the data;
random numbers are keyed by position and need no state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from stepdistill.config.run import TrainConfig
from stepdistill.core.method import Method
from stepdistill.monitoring.logs import RunLog
from stepdistill.monitoring.own_validation import OwnValidation
from stepdistill.monitoring.validation import Validator
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.training.checkpoint import load_checkpoint, prune, read_state, save_checkpoint
from stepdistill.training.feed import Feed
from stepdistill.training.run_identity import resume_fits, same_data


class Resumable:
    """The part of a trainer that is saved and gone on from."""

    args: TrainConfig
    accelerator: Accelerator
    facts: dict[str, Any]
    method: Method[Any]
    bank: RoleBank
    optimizer: Any
    log: RunLog
    validator: Validator
    sharded: bool
    step: int
    owes_validation: bool
    own_validation: OwnValidation
    feed: Feed
    gan_feed: Feed | None
    seconds: float

    def _validate_by(self, said: dict[str, Any] | None = None) -> None:
        """Go by what was decided on validation. said: see RunLog.validates_by."""
        self.validator.args = args = self.own_validation.args
        if self.own_validation.chosen:  # no more memory than training takes
            self.validator.batch = args.train_batch_size
        self.log.validates_by(args, said)

    def save(self) -> Path:
        """Write checkpoint-STEP whole, then drop the oldest beyond the limit; returns its path."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.step}"
        self.log.check_finite()
        accelerator, args = self.accelerator, self.args
        log_state = self.log.state_dict()
        accelerator.wait_for_everyone()
        main = accelerator.is_main_process
        if main or self.sharded:
            scaler = accelerator.scaler
            state = {
                "step": self.step,
                "batches_seen": self.feed.seen,
                "gan_batches_seen": self.gan_feed.seen if self.gan_feed else 0,
                "seconds": self.seconds,
                "world_size": accelerator.num_processes,
                "global_batch": accelerator.num_processes * args.train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                "owes_validation": self.owes_validation,
                "own_validation": self.own_validation.state_dict(),
                "grad_scaler": scaler.state_dict() if scaler is not None else {},
                "facts": self.facts,
                "log": log_state,
            }
            buffers = self.method.state_dict()
            shown = main and not args.disable_progress_bar
            save_checkpoint(folder, self.bank, self.optimizer, buffers, state, self.sharded, shown)
        if main:
            prune(folder, args.checkpoints_total_limit, self.log.protected())
        accelerator.wait_for_everyone()
        return folder

    def resume(self, where: str) -> None:
        """Continue from a checkpoint folder or the newest whole one ("latest")."""
        folder: Path | None = Path(where)
        if where == "latest":
            folder, skipped = newest_valid(Path(self.args.output_dir))
            for line in skipped:
                self.accelerator.print(f"resume: {line}")
            if folder is None:
                self.accelerator.print("resume: no whole checkpoint yet, starting at step 0")
                return
        assert folder is not None
        state = read_state(folder)
        resume_fits(state, self.args, self.accelerator.num_processes, self.facts)
        self.restore(folder)
        before = state["facts"].get("data")
        if not same_data(before, self.facts.get("data"), allowed=True):
            position = {"step": self.step, "before": before}
            self.facts.setdefault("data_changed", []).append(position)
            self.accelerator.print(f"resume: other data from step {self.step} on (data_changed)")
        self.accelerator.print(f"resume: continuing {folder.name} at step {self.step}")

    def restore(self, folder: Path) -> None:
        """Load a whole checkpoint, whatever number of processes saved it."""
        state = read_state(folder)
        self.method.load_state_dict(load_checkpoint(folder, self.bank, self.optimizer))
        if self.accelerator.scaler is not None and state["grad_scaler"]:
            self.accelerator.scaler.load_state_dict(state["grad_scaler"])
        self.step, self.feed.seen = state["step"], state["batches_seen"]
        if self.gan_feed is not None:
            self.gan_feed.seen = state.get("gan_batches_seen", 0)
        self.seconds = state["seconds"]
        self.owes_validation = state.get("owes_validation", False)
        self.own_validation.load_state_dict(state.get("own_validation"))
        if "validation" in state["facts"]:
            self.facts["validation"] = state["facts"]["validation"]
        self._validate_by()
        self.facts.setdefault("data", state["facts"].get("data"))
        if "data_changed" in state["facts"]:
            self.facts["data_changed"] = list(state["facts"]["data_changed"])
        # A run keeps the law that it began by.
        self.facts["draw_law"] = state["facts"].get("draw_law", 1)
        self.log.load_state_dict(state.get("log", {}))
