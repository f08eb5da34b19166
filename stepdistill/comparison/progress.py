"""How far a run of a comparison has come, on disk: what a killed one needs to go on as it began.

The trainers' own checkpoints hold weights and data positions; here stand the numbers of updates
(measured once: a second measurement would train another student), the time spent, and what was
judged on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.config.recipes import Training
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.storage.files import read_json, set_aside, write_text
from stepdistill.training.checkpoint import read_state

from .teacher_setup import Plain

SAVES = 8  # checkpoints of each training: a kill costs at most that part of it


@dataclass
class Leg:
    """One training of a run. updates: planned; step, wall: of its trainer when last noted; seconds:
    spent so far, of the run's clock."""

    updates: int
    step: int = 0
    wall: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """All of a run. curve: a point for each time that it was judged."""

    file: Path
    legs: list[Leg] = field(default_factory=list)
    curve: list[Plain] = field(default_factory=list)

    @classmethod
    def of(cls, work: Path, trainings: Sequence[Training]) -> Progress:
        """What the folder `work` holds of these trainings; it is emptied where it holds others."""
        file, plan = work / "progress.json", json.loads(json.dumps(list(map(asdict, trainings))))
        if file.is_file():
            known = read_json(file, ("plan", "legs", "curve"))
            if known["plan"] == plan:
                return cls(file, [Leg(**leg) for leg in known["legs"]], known["curve"])
        elif work.is_dir() and any(work.iterdir()):
            set_aside(work)  # no run's
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        made = cls(file)
        made._write(plan)
        return made

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return sum(leg.seconds for leg in self.legs)

    def save(self) -> None:
        """Write it whole."""
        self._write(read_json(self.file, ("plan",))["plan"])

    def _write(self, plan: Any) -> None:
        state = {"plan": plan, "legs": [asdict(leg) for leg in self.legs], "curve": self.curve}
        write_text(self.file, json.dumps(state) + "\n")

    def catch_up(self, leg: Leg, run: Path) -> None:
        """Add the time that the newest checkpoint of `run` holds and nobody noted: a kill came
        between. A checkpoint has the wall clock alone: it is scaled as it was before."""
        folder, _ = newest_valid(run)
        if folder is None:
            return
        state = read_state(folder)
        scale = leg.seconds / leg.wall if leg.wall else 1.0
        leg.seconds += scale * max(0.0, state["seconds"] - leg.wall)
        leg.step, leg.wall = state["step"], state["seconds"]
        self.save()

    def judged(self, share: float) -> bool:
        """Whether that point of the curve is there."""
        return any(point["share"] == share for point in self.curve)


def shares(points: int) -> list[float]:
    """The parts of the budget that a student is judged at: the whole, its half, its quarter, ...

    Halves, since quality is looked at over the logarithm of time.
    """
    return [0.5**k for k in reversed(range(points))]


def stops(
    asked: Sequence[float], before: float, part: float, updates: int, last: bool
) -> dict[int, float]:
    """Update -> share of the budget, of the points inside one training.

    Args: asked: see `shares`; before, part: the budget's share before this training, and its own;
        last: whether none comes after it. A point at its very end belongs to it.
    """
    seconds_at: dict[int, float] = {}
    for share in asked:
        if before < share and (share <= before + part or last):
            at = updates if share == 1.0 else round((share - before) / part * updates)
            seconds_at[min(max(at, 1), updates)] = share
    return seconds_at
