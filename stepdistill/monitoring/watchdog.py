"""The watchdog: sees a run collapse, then warns, backs off or stops it.

Norms and losses stay on the device until the log line looks at them, so watching costs no
synchronisation per step (save for nonfinite = back_off, which asks for one). What it decides from
is saved with a checkpoint and looked at only where an uninterrupted run looks too: a resumed run
backs off as the first one did.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from stepdistill.config.run import TrainConfig
from stepdistill.monitoring.reward_check import RewardCheck
from stepdistill.monitoring.sample_checks import SampleChecks
from stepdistill.monitoring.step_signs import SignChecks
from stepdistill.storage.checkpoints import list_checkpoints, newest_valid, step_of
from stepdistill.storage.folders import fault_of

_MIN_HISTORY = 20  # updates before a median means something
_MOST_BACK_OFFS = 5
_HINT = "Lower --learning_rate or its role's"


class WatchdogStop(FloatingPointError):
    """A check has ended the run, and saved nothing; it names the last good checkpoint.

    status: what a stopped process leaves with: starting it again unchanged would not help.
    """

    status = 76


@dataclass(frozen=True)
class Alarm:
    """One thing that a check has told. role: whose learning rate back_off lowers."""

    step: int
    check: str
    role: str
    action: str
    message: str

    @property
    def line(self) -> str:
        return f"watchdog: {self.check}, {self.role}, step {self.step}: {self.message}"


class Watchdog:
    """Watches one run; see `WatchdogConfig` for the checks.

    alarms: those told since they were last taken away by the log.
    healthy_step: the last validation at which no check of samples was bad; none means unknown.
    """

    def __init__(self, args: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self._folder = args.watchdog, Path(args.output_dir)
        self._accelerator = accelerator
        self._losses: dict[str, list[tuple[int, Tensor]]] = {}  # phase -> (step, loss)
        self._pending: dict[str, list[tuple[int, Tensor]]] = {}  # role -> (step, norm)
        self._history: dict[str, deque[float]] = {}
        self._scales: dict[str, float] = {}
        self._raised_at: dict[str, int] = {}  # role -> when its rate was last changed
        self._told: dict[str, int] = {}
        self._skipped = 0
        self._fit = -1  # the last step at which an update was allowed
        self._trusted: int | None = None  # while updates are skipped: the last step to go back to
        self.samples = SampleChecks(self.config)
        self.signs = SignChecks(self.config, args.logging_steps)
        self.rewards = RewardCheck(self.config, args.logging_steps, args.rewards)
        self.healthy_step: int | None = None
        self.alarms: list[Alarm] = []

    # ------------------------------------------------------------ every update
    def see_loss(self, phase: str, step: int, total: Tensor) -> None:
        """One loss; stays on the device."""
        if self.config.nonfinite == "stop" or self._scaled:
            self._losses.setdefault(phase, []).append((step, total))

    def allows(self, norms: Mapping[str, Tensor], step: int) -> bool:
        """Whether these gradients (norms by role, before clipping) may be used.

        Errors: WatchdogStop after max_skipped_updates refusals in a row.
        """
        if self.config.nonfinite == "back_off":
            # All ranks have the same norms, so all skip or none.
            finite = math.isfinite(sum(float(norm) for norm in norms.values()))
            if not finite and (not self._scaled or self._lost()):
                self._losses.clear()
                self._skip(norms, step)
                return self._scaled  # a GradScaler skips it itself, and counts on being called
            if finite:
                self._skipped, self._trusted, self._fit = 0, None, step
            self._losses.clear()
        for role, norm in norms.items():
            self._pending.setdefault(role, []).append((step, norm.detach()))
        return True

    @property
    def _scaled(self) -> bool:
        return self._accelerator.scaler is not None

    def _lost(self) -> bool:
        """Whether a loss is non-finite on any rank: no scale of gradients helps against that."""
        return any(self._first_bad(values)[0] >= 0 for values in self._losses.values())

    def _skip(self, norms: Mapping[str, Tensor], step: int) -> None:
        if not self._skipped:
            self._trusted = step if self._fit == step else step - 1
        self._skipped += 1
        bad = [role for role, norm in norms.items() if not math.isfinite(float(norm))]
        for role in bad:
            self._alarm(step, "nonfinite", role, "back_off", "skipped a non-finite gradient")
        if self._skipped >= self.config.max_skipped_updates:
            self._stop(f"{bad[0]}: {self._skipped} non-finite gradients in a row up to step {step}")

    def scale_rates(self, optimizer: Optimizer) -> None:
        """Lower the learning rates, just set for this step, of roles that back off."""
        for group in optimizer.param_groups:
            group["lr"] *= self._scales.get(group["role"], 1.0)

    # ---------------------------------------------------------- at log lines
    def check_finite(self) -> None:
        """Errors: WatchdogStop naming role, step and last good checkpoint."""
        seen = {f"{phase}: expected a finite loss": v for phase, v in self._losses.items()}
        if not self._scaled:  # a GradScaler overflows now and then by design, and skips
            seen |= {f"{role}: expected a finite gradient": v for role, v in self._pending.items()}
        firsts = [(*self._first_bad(values), rule) for rule, values in seen.items()]
        bad = [one for one in firsts if one[0] >= 0]
        if bad:
            step, proven, rule = min(bad, key=lambda one: one[0])
            line = f"{rule}, got a non-finite one at step {step}"
            before = takewhile(lambda other: other != rule, seen)  # phases that were finite there
            proven |= any(at == step for other in before for at, _ in seen[other])
            self._stop(line, newest=step if proven else step - 1)
        self._losses.clear()

    def _first_bad(self, values: Sequence[tuple[int, Tensor]]) -> tuple[int, bool]:
        """(step of the first non-finite value on any rank, whether that step began with a finite
        one); -1 for none.

        Weights that an update ruined are saved before a loss shows it: a checkpoint is known to be
        good once the step that it begins has had a finite one.
        """
        if not values:
            return -1, False
        finite = torch.stack([value.float() for _, value in values]).isfinite()
        if self._accelerator.num_processes > 1:
            finite = self._accelerator.reduce(finite.float()) == self._accelerator.num_processes
        places = (~finite).nonzero()
        if not len(places):
            return -1, False
        first = int(places[0])
        return values[first][0], first > 0 and values[first - 1][0] == values[first][0]

    def check_updates(self, step: int) -> None:
        """Look at the norms since the last call. Errors: WatchdogStop where a check stops."""
        self.check_finite()
        for role, pending in self._pending.items():
            if not pending:
                continue
            values = torch.stack([norm.float() for _, norm in pending]).tolist()
            history = self._history.setdefault(role, deque(maxlen=self.config.grad_norm_window))
            worst = (0.0, 0, 0.0)  # ratio, step, norm
            for (at, _), value in zip(pending, values, strict=True):
                if not math.isfinite(value):
                    continue  # the GradScaler's affair
                usual = statistics.median(history) if len(history) >= _MIN_HISTORY else 0.0
                if usual > 0.0:
                    worst = max(worst, (value / usual, at, value))
                history.append(value)
            pending.clear()
            ratio, at, norm = worst
            if self.config.grad_norm != "off" and ratio > self.config.grad_norm_ratio:
                line = f"gradient norm {norm:.3g} is {ratio:.3g} times its running median"
                self._alarm(at, "grad_norm", role, self.config.grad_norm, line, now=step)
        self._recover(step)

    def _recover(self, step: int) -> None:
        for role, scale in list(self._scales.items()):
            if step - self._raised_at[role] >= self.config.cooldown_steps:
                self._raised_at[role] = step
                self._scales[role] = min(1.0, scale / self.config.back_off_factor)
                if self._scales[role] == 1.0:
                    del self._scales[role], self._raised_at[role]

    def check_signs(self, step: int, values: Mapping[str, float], done: float) -> None:
        """Look at a log line's means, the same on all ranks. Args: done: share of the run.

        Errors: WatchdogStop where a check stops.
        """
        for check, line in self.signs.bad(values, done).items():
            role = "fake" if check == "fake_error" else "student"
            self._alarm(step, check, role, getattr(self.config, check), line)
        if hacked := self.rewards.bad(values):
            self._alarm(step, "reward", "student", self.config.reward, hacked)

    # --------------------------------------------------------- at validations
    def check_samples(self, step: int, metrics: Mapping[str, float], done: float = 0.0) -> None:
        """Look at a planned validation's metrics, the same on all ranks. Args: done: see above.

        Errors: WatchdogStop where a check stops.
        """
        off = self.samples.guidance(metrics)
        if off is not None:  # no learning rate helps
            action = "stop" if self.config.drift == "stop" else "warn"
            self._alarm(step, "guidance", "teacher", action, off)
        alarms = self.samples.bad(step, metrics, done)
        if not alarms:
            self.healthy_step = step
        for check, line in alarms.items():
            if self.samples.strikes[check] >= self.config.patience:
                role = "fake" if check == "fake_lag" else "student"
                self._alarm(step, check, role, getattr(self.config, check), line)

    # ------------------------------------------------------------------ acting
    def _alarm(
        self, at: int, check: str, role: str, action: str, message: str, now: int | None = None
    ) -> None:
        step = at if now is None else now
        if action == "back_off":
            slowed = role if check in ("nonfinite", "grad_norm") else "student"
            factor = self.config.back_off_factor
            lowest = factor**_MOST_BACK_OFFS
            self._scales[slowed] = max(lowest, self._scales.get(slowed, 1.0) * factor)
            self._raised_at[slowed] = step
            message += f"; learning rate of {slowed} now times {self._scales[slowed]:g}"
        key = f"{check}/{role}"
        fresh = step - self._told.get(key, -self.config.cooldown_steps)
        if action == "back_off" or fresh >= self.config.cooldown_steps:
            self._told[key] = step
            self.alarms.append(Alarm(at, check, role, action, message))
        if action == "stop":
            guided = check == "guidance"
            option, hint = ("drift", "Lower the guidance") if guided else (check, _HINT)
            self._stop(f"{role}: {message} at step {at} (watchdog.{option})", hint)

    def _stop(self, why: str, hint: str = _HINT, newest: int | None = None) -> None:
        good = self.last_good(newest)
        if good is not None:
            hint += f", and go on from there with --resume_from_checkpoint {good}"
        raise WatchdogStop(f"{why}. Last good checkpoint: {good or 'none yet'}. {hint}.")

    def last_good(self, newest: int | None = None) -> Path | None:
        """The newest whole checkpoint up to `newest`, and from before any trouble that lasts."""
        limits = [n for n in (newest, self._trusted) if n is not None]
        if any(self.samples.strikes.values()):
            limits.append(-1 if self.healthy_step is None else self.healthy_step)
        if not limits:
            return newest_valid(self._folder)[0]
        for folder in reversed(list_checkpoints(self._folder)):
            if step_of(folder) <= min(limits) and fault_of(folder) is None:
                return folder
        return None

    def protected(self) -> tuple[str, ...]:
        """Names of checkpoints that pruning must leave: the last good one, in such trouble."""
        in_doubt = self._trusted is not None or any(self.samples.strikes.values())
        good = self.last_good() if in_doubt else None
        return () if good is None else (good.name,)

    def take_alarms(self) -> Sequence[dict[str, Any]]:
        """What was told since the last call, as plain records with their printed line."""
        records = [{**asdict(alarm), "line": alarm.line} for alarm in self.alarms]
        self.alarms = []
        return records

    # -------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """JSON-able; exact, as every float32 is a float."""
        return {
            "pending": {
                role: [[at, float(norm)] for at, norm in values]
                for role, values in self._pending.items()
            },
            "history": {role: list(values) for role, values in self._history.items()},
            "scales": dict(self._scales),
            "raised_at": dict(self._raised_at),
            "told": dict(self._told),
            "skipped": self._skipped,
            "fit": self._fit,
            "trusted": self._trusted,
            "healthy_step": self.healthy_step,
            "samples": self.samples.state_dict(),
            "signs": self.signs.state_dict(),
            "rewards": self.rewards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; an empty one (a run begun without a watchdog) starts anew."""
        if not state:
            return
        device, window = self._accelerator.device, self.config.grad_norm_window
        self._losses, self.alarms = {}, []
        self._pending = {
            role: [(at, torch.tensor(norm, device=device)) for at, norm in values]
            for role, values in state["pending"].items()
        }
        self._history = {role: deque(v, maxlen=window) for role, v in state["history"].items()}
        self._scales, self._raised_at = dict(state["scales"]), dict(state["raised_at"])
        self._told, self._skipped = dict(state["told"]), state["skipped"]
        self._fit, self._trusted = state.get("fit", -1), state.get("trusted")
        self.healthy_step = state["healthy_step"]
        self.samples.load_state_dict(state["samples"])
        self.signs.load_state_dict(state.get("signs"))
        self.rewards.load_state_dict(state.get("rewards"))
