"""RunLog: JSONL always, Accelerate trackers when asked, a tqdm bar with loss, rate and ETA.

Values stay on the device between log lines, so logging costs no synchronisation per step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.training.checkpoint import RUN_FILE, newest_valid
from stepdistill.training.config import TrainConfig
from stepdistill.training.whole import write_text


class RunLog:
    """Collects a window of values and writes their means.

    Writes OUTPUT_DIR/run.json (the run's facts) and OUTPUT_DIR/log.jsonl on the main process.
    """

    def __init__(
        self, accelerator: Accelerator, args: TrainConfig, facts: Mapping[str, Any]
    ) -> None:
        self._accelerator, self._args = accelerator, args
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad: dict[str, Tensor] = {}  # phase -> step of its first non-finite loss, or -1
        self._bar: Any = None
        self._window_start = (0, 0.0)
        self.last: dict[str, float] = {}
        self._facts = facts
        self._folder = Path(args.output_dir)
        self._file = self._folder / "log.jsonl"

    def start(self, step: int, seconds: float) -> None:
        """Open the logs at `step`; lines past it belong to a run that was cut off.

        Nothing is written before: a trainer made to export leaves the run's record alone.
        """
        if self._accelerator.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / RUN_FILE, json.dumps(self._facts, indent=2))
        if self._args.report_to:
            self._accelerator.init_trackers("stepdistill", config={"method": self._facts["method"]})
        if self._accelerator.is_main_process and self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            write_text(self._file, "".join(kept))
        self._window_start = (step, seconds)
        if self._accelerator.is_main_process and not self._args.disable_progress_bar:
            self._bar = tqdm(
                total=self._args.max_train_steps, initial=step, desc="distil", unit="step"
            )

    def _collect(self, key: str, value: Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._counts[key] = self._counts.get(key, 0) + 1

    def add(self, phase: str, step: int, total: Tensor, logs: Mapping[str, Tensor]) -> None:
        """One loss evaluation; values stay on the device."""
        self._collect(f"loss/{phase}", total)
        for name, value in logs.items():
            self._collect(f"{phase}/{name}", value.float())
        bad = self._first_bad.setdefault(phase, torch.full_like(total, -1.0))
        now = (~torch.isfinite(total)) & (bad < 0)
        self._first_bad[phase] = torch.where(now, torch.full_like(bad, float(step)), bad)

    def add_norms(self, norms: Mapping[str, Tensor]) -> None:
        for role, norm in norms.items():
            self._collect(f"grad_norm/{role}", norm.detach())

    def due(self, step: int) -> bool:
        return step % self._args.logging_steps == 0

    def check_finite(self) -> None:
        """Errors: FloatingPointError naming phase, step and last good checkpoint."""
        for phase, bad in self._first_bad.items():
            worst = self._accelerator.gather(bad.reshape(1)).max() if self._many else bad
            if float(worst) >= 0:
                good, _ = newest_valid(self._folder)
                raise FloatingPointError(
                    f"{phase}: expected a finite loss, got a non-finite one at step {int(worst)}. "
                    f"Last good checkpoint: {good or 'none yet'}. Lower --learning_rate or its "
                    "role's, or use --mixed_precision no."
                )

    @property
    def _many(self) -> bool:
        return self._accelerator.num_processes > 1

    def write(self, step: int, seconds: float, rates: Mapping[str, float]) -> None:
        """One log line of means since the last; stops the run on a non-finite loss."""
        self.check_finite()
        keys = list(self._sums)
        means = torch.stack([self._sums[k].float() / self._counts[k] for k in keys])
        if self._many:
            means = self._accelerator.reduce(means, reduction="mean")
        values = dict(zip(keys, means.tolist(), strict=True))
        values |= {f"lr/{role}": rate for role, rate in rates.items()}
        from_step, from_seconds = self._window_start
        values["steps_per_second"] = (step - from_step) / max(seconds - from_seconds, 1e-9)
        self._window_start = (step, seconds)
        self._sums, self._counts, self.last = {}, {}, values
        if not self._accelerator.is_main_process:
            return
        line = {"step": step, "seconds": round(seconds, 3), **values}
        with self._file.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._args.report_to:
            self._accelerator.log(values, step=step)
        if self._bar is not None:
            losses = {
                k.removeprefix("loss/"): f"{v:.4g}" for k, v in values.items() if "loss/" in k
            }
            self._bar.set_postfix(losses)
            self._bar.update(step - self._bar.n)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Send a picture to the trackers that take one."""
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: np.asarray(image)[None]}, step=step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._args.report_to:
            self._accelerator.end_training()
