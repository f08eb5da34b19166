"""RunLog: JSONL always, Accelerate trackers when asked, a tqdm bar with loss, rate and ETA.

Values stay on the device between log lines, so logging costs no synchronisation per step. The
watchdog looks at a run where its log does, and the live report is written there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.config.run import TrainConfig
from stepdistill.monitoring.best import Best, check_measured, new_best, read_best, write_best
from stepdistill.monitoring.validation import Validation
from stepdistill.monitoring.validation_line import line_of
from stepdistill.monitoring.watchdog import Watchdog, WatchdogStop
from stepdistill.reporting.bars import bar, planned_steps
from stepdistill.storage.checkpoints import discard, is_users
from stepdistill.storage.files import RUN_FILE, one_line, write_text
from stepdistill.storage.folders import fault_of

from .records import mend
from .run_report import REPORT, write_run_report

_REPORT_SECONDS = 20.0  # between live reports at log lines; validations always write one


class RunLog:
    """Collects a window of values and writes their means.

    Writes run.json (the run's facts), log.jsonl, validation.jsonl, events.jsonl (alarms, and the
    run's end) and report.html into OUTPUT_DIR, on the main process.
    """

    def __init__(
        self, accelerator: Accelerator, args: TrainConfig, facts: Mapping[str, Any]
    ) -> None:
        self._accelerator, self._args = accelerator, args
        self.watchdog = Watchdog(args, accelerator)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Any] = {}
        self._bar: Any = None
        self._window_start = self._began = (0, 0.0)
        self.last: dict[str, float] = {}
        self._open = False  # between start and the end's event
        self._best: Best | None = None
        self._reported = -math.inf
        self._failed: set[str] = set()  # what could not be written, see _aside
        self._facts = facts
        self._folder = Path(args.output_dir)
        self._file = self._folder / "log.jsonl"

    def start(self, step: int, seconds: float) -> None:
        """Open the logs at `step`; lines past it belong to a run that was cut off.

        Nothing is written before: a trainer made to export leaves the run's record alone.
        """
        self._open = True
        if self._accelerator.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            for line in mend(self._folder, step):
                self._say(line)
            write_text(self._folder / RUN_FILE, json.dumps(self._facts, indent=2))
            self.keep_best()  # a kill may have come between the checkpoint and its pointer
        if self._args.report_to:
            self._accelerator.init_trackers("stepdistill", config={"method": self._facts["method"]})
        self._window_start = self._began = (step, seconds)
        if self._accelerator.is_main_process and not self._args.disable_progress_bar:
            total = self._args.max_train_steps
            self._bar = bar(total=total, initial=step, desc="distil", unit="step")

    # ------------------------------------------------------------ every update
    def _collect(self, key: str, value: Tensor) -> None:
        count: Any = 1
        if self._args.watchdog.nonfinite == "back_off":  # skipped updates have no part in a mean
            count = torch.isfinite(value).float()
            value = torch.where(count > 0, value, torch.zeros_like(value))
        self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
        self._counts[key] = self._counts.get(key, 0) + count

    def add(self, phase: str, step: int, total: Tensor, logs: Mapping[str, Tensor]) -> None:
        """One loss evaluation; values stay on the device."""
        self._collect(f"loss/{phase}", total)
        for name, value in logs.items():
            self._collect(f"{phase}/{name}", value.float())
        self.watchdog.see_loss(phase, step, total)

    def allows(self, norms: Mapping[str, Tensor], step: int) -> bool:
        """One update's gradient norms by role; whether the watchdog lets it be made."""
        for role, norm in norms.items():
            self._collect(f"grad_norm/{role}", norm.detach())
        return self.watchdog.allows(norms, step)

    def advance(self, step: int, seconds: float) -> None:
        """Move the bar; its end, and so the time left, is that of the budget that binds."""
        if self._bar is not None:
            most, budget = self._args.max_train_steps, self._args.max_train_seconds
            self._bar.total = planned_steps(step, seconds, self._began, most, budget)
            self._bar.update(step - self._bar.n)

    # -------------------------------------------------------------- log lines
    def due(self, step: int) -> bool:
        return step % self._args.logging_steps == 0

    def check_finite(self) -> None:
        """Errors: WatchdogStop naming phase, step and last good checkpoint."""
        self.watchdog.check_finite()

    def write(self, step: int, seconds: float, rates: Mapping[str, float]) -> None:
        """One log line of means since the last.

        Where the run ends between two lines, the window stays open, so that a resumed run goes on
        as if it had not.
        Errors: WatchdogStop where a check of the watchdog stops the run; no line is written then.
        """
        planned = self.due(step)
        if planned:
            self.watchdog.check_updates(step)
        else:
            self.watchdog.check_finite()
        values = self._means()
        if planned:
            self.watchdog.check_signs(step, values, self._done(step, seconds))
        values |= {f"lr/{role}": rate for role, rate in rates.items()}
        from_step, from_seconds = self._window_start
        values["steps_per_second"] = (step - from_step) / max(seconds - from_seconds, 1e-9)
        self.last = values
        if planned:
            self._window_start = (step, seconds)
            self._sums, self._counts = {}, {}
        early = {} if planned else {"early": True}
        self._append("log.jsonl", {"step": step, "seconds": round(seconds, 3), **values, **early})
        self._tell_alarms(step)
        if not self._accelerator.is_main_process:
            return
        if self._args.report_to:
            with self._aside("report_to"):
                self._accelerator.log(values, step=step)
        if self._bar is not None:
            losses = {
                k.removeprefix("loss/"): f"{v:.4g}" for k, v in values.items() if "loss/" in k
            }
            self._bar.set_postfix(losses, refresh=False)
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self.report()

    def _done(self, step: int, seconds: float) -> float:
        """The share of the run that is behind it, by the budget that binds."""
        limit = self._args.max_train_seconds
        return max(step / self._args.max_train_steps, seconds / limit if limit else 0.0)

    def _means(self) -> dict[str, float]:
        keys = list(self._sums)
        means = torch.stack([self._sums[k].float() / self._counts[k] for k in keys])
        if self._accelerator.num_processes > 1:
            means = self._accelerator.reduce(means, reduction="mean")
        pairs = zip(keys, means.tolist(), strict=True)
        return {key: value for key, value in pairs if math.isfinite(value)}

    # -------------------------------------------------------------- validation
    def validation(self, result: Validation | None, step: int, seconds: float) -> bool:
        """Write a validation (made on the main process) down; call on all ranks.

        Returns: whether it is the best so far, so that the step's checkpoint should be kept.
        Errors: WatchdogStop where a check of samples stops the run; ValueError, on all ranks,
            where best_metric is none of what is measured.
        """
        # The last step's, where it is none of the planned ones, decides nothing: a run that is
        # stopped early and resumed must go the way of one that was not.
        planned = step % (self._args.validation_steps or 1) == 0
        line = {"step": step, "seconds": round(seconds, 3)}
        if result is not None:
            finite = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
            scalars = {**line, **finite, "trajectory": result.trajectory}
            self._append("validation.jsonl", scalars if planned else {**scalars, "early": True})
            self.image("validation", result.grid, step)
            if self._args.report_to:
                scalars = {f"validation/{k}": v for k, v in finite.items()}
                with self._aside("report_to"):
                    self._accelerator.log(scalars, step=step)
        shared: list[Any] = [None if result is None else result.metrics]
        metrics = broadcast_object_list(shared)[0]
        if planned:
            check_measured(self._args, metrics)
            self.watchdog.check_samples(step, metrics, self._done(step, seconds))
            self._tell_alarms(step)
        decides = planned or step >= self._args.max_train_steps
        better = new_best(self._best, self._args, step, metrics) if decides else None
        self._best = better or self._best
        if self._accelerator.is_main_process:
            self.report()
        return better is not None

    def keep_best(self) -> None:
        """Point best.json at the best's checkpoint, which is whole; the one before may go then."""
        best, before = self._best, read_best(self._folder)
        if best is None or best == before or not self._accelerator.is_main_process:
            return
        if fault_of(self._folder / best.checkpoint, hashes=False) is not None:
            return
        write_best(self._folder, best)
        if before is not None and before.extra and before.step < best.step:
            old = self._folder / before.checkpoint
            if old.is_dir() and not is_users(old):
                discard(old)

    def protected(self) -> set[str]:
        """Names of checkpoints that are not to be deleted."""
        best = set() if self._best is None else {self._best.checkpoint}
        return {*self.watchdog.protected(), *best}

    # ------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The open window, the watchdog's memory and the best so far; call on all ranks."""
        sums = {k: v.float() for k, v in self._sums.items()}
        if self._accelerator.num_processes > 1:
            sums = {k: self._accelerator.reduce(v, reduction="mean") for k, v in sums.items()}
        return {
            "sums": {key: float(value) for key, value in sums.items()},
            "counts": {key: float(value) for key, value in self._counts.items()},
            "watchdog": self.watchdog.state_dict(),
            "best": None if self._best is None else asdict(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; an empty one starts a new window."""
        if not state:
            return
        device = self._accelerator.device
        self._sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}
        self._counts = dict(state["counts"])
        self.watchdog.load_state_dict(state["watchdog"])
        self._best = None if state["best"] is None else Best(**state["best"])

    # ----------------------------------------------------------------- outputs
    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with self._aside(name), (self._folder / name).open("a") as handle:
                handle.write(json.dumps(record) + "\n")

    @contextmanager
    def _aside(self, what: str) -> Iterator[None]:
        """Within: what goes wrong ends no run; it is said once of each `what`."""
        try:
            yield
        except Exception as err:
            if what not in self._failed:
                self._say(f"{what}: not written, the run goes on. {one_line(err)}")
            self._failed.add(what)

    @staticmethod
    def _say(line: str) -> None:
        tqdm.write(line)

    def _tell_alarms(self, step: int) -> None:
        """Alarms since the last time: a line each on the terminal and in events.jsonl.

        Each is of an update before `step`: a run that begins again in between tells it again.
        """
        for alarm in self.watchdog.take_alarms():
            self._append("events.jsonl", {"kind": "alarm", **alarm, "logged": step})
            if self._accelerator.is_main_process:
                self._say(alarm["line"])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Send a picture to the trackers that take one."""
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with self._aside("report_to"):
                    tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)

    def validates_by(self, args: TrainConfig, said: Mapping[str, Any] | None = None) -> None:
        """Go by these options of validation; said: what run.json is to say of them, where that is
        new."""
        self._args = args
        if said is not None and self._accelerator.is_main_process:
            self._say(line_of(said))
            with self._aside(RUN_FILE):
                write_text(self._folder / RUN_FILE, json.dumps(self._facts, indent=2))

    def report(self) -> None:
        """Write report.html as the run stands."""
        with self._aside(REPORT):
            write_run_report(self._folder, write_text)
        self._reported = time.monotonic()

    def close(self, step: int, state: str = "finished", why: str = "") -> None:
        """End the logs, on all ranks; state ("finished", "preempted", ...) and why are reported."""
        self._end(step, state, why)
        if self._args.report_to:
            self._accelerator.end_training()

    def preempted(self, step: int) -> None:
        """End the logs of a run that a signal ends between its steps, if it has begun."""
        if self._open:
            self.close(step, "preempted")

    def broken_off(self, step: int, err: BaseException) -> None:
        """End the logs of a run that `err` ends, if it has begun and not ended; hides no `err`.

        The other ranks may be anywhere: nothing is asked of them, but by a watchdog's stop.
        """
        state, why = "failed", shorten(f"{type(err).__name__}: {err}", 600).removesuffix(":")
        end = self._end
        if isinstance(err, WatchdogStop):  # all ranks have it
            state, why, end = "stopped by the watchdog", str(err), self.close
        elif isinstance(err, KeyboardInterrupt):
            state, why = "interrupted", "Go on with --resume_from_checkpoint latest."
        with suppress(Exception):
            if self._open:
                self._tell_alarms(step)
                end(step, state, why)

    def _end(self, step: int, state: str, why: str) -> None:
        self._append("events.jsonl", {"step": step, "kind": "end", "state": state, "why": why})
        self._open = False
        if self._bar is not None:
            self._bar.close()
        if self._accelerator.is_main_process:
            self.report()
