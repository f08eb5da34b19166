"""DisBack: the student follows targets that walk back to the teacher the way the teacher came.

Degradation recording: the fake, which starts at the teacher, is fitted to the samples of the
student, which waits; N states on its way are the nodes 1, ..., N, each nearer to the student.
Distribution backtracking: DMD2 with the fake going on from node N, and for the teacher in turn
    node N-1, ..., node 1, the teacher itself
so that the two denoisers whose difference moves the student are never far apart. N = 0 is DMD2.
Source: Zhang et al. 2024, arXiv:2408.15991, and its released code.
Differs from the code: it strips no prefix of a node's saved names and loads them non-strictly, by
which none of them would match (read, not run); the teacher is the target to the end of the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field, model_validator

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase, Role
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation, Scores
from stepdistill.methods.scores_config import ScoreConfig


class DisBackConfig(ScoreConfig):
    """Options of disback, besides those of every score distillation."""

    nodes: int = Field(default=10, ge=0)
    """States recorded while the fake leaves the teacher for the untrained student's samples, evenly
    spaced. The last is the fake's own start, the others are stored as the fake is: an adapter
    each, or a copy each. 0 is dmd2."""
    record_updates: int = Field(default=100, ge=1)
    """Fake updates of the recording, each a step of the run, in which the student waits."""
    backtrack_updates: int = Field(default=200, ge=1)
    """Student updates that the targets take from the nodes to the teacher, which stays."""

    @model_validator(mode="after")
    def _check_schedule(self) -> DisBackConfig:
        least = {"record_updates": 1, "backtrack_updates": 2}
        for name in self.changed(*least):
            if self.nodes < (nodes := least[name]):
                warnings.warn(
                    f"{name} {getattr(self, name)} has no effect with nodes {self.nodes}: it needs "
                    f"{nodes} or more.",
                    stacklevel=2,
                )
        return self

    @property
    def recording(self) -> range:
        """The steps of the run in which the fake alone is trained."""
        begin = self.warm_start.updates
        return range(begin, begin + (self.record_updates if self.nodes else 0))

    def recorded(self, step: int) -> tuple[int, ...]:
        """The stored nodes that are the fake as it is after that step."""
        if step not in self.recording:
            return ()
        done = 1 + step - self.recording.start
        marks = {k: -(-k * self.record_updates // self.nodes) for k in range(1, self.nodes)}
        return tuple(k for k, mark in marks.items() if mark == done)

    @property
    def teacher_from(self) -> int:
        """The first step whose target is the teacher itself."""
        return self.recording.stop + (self.backtrack_updates if self.nodes > 1 else 0)

    def target(self, step: int) -> int:
        """The node in the teacher's place at a step behind the recording; 0 is the teacher."""
        if step >= self.teacher_from:
            return 0
        walked = (step - self.recording.stop) * (self.nodes - 1) // self.backtrack_updates
        return self.nodes - 1 - walked


class DisBack(ScoreDistillation[DisBackConfig]):
    """Distribution matching of targets between the untrained student and the teacher."""

    name = "disback"
    paper = "Zhang et al. 2024, arXiv:2408.15991"
    Config = DisBackConfig
    status = "trained on real data here"
    aliases = {"distribution_backtracking": {}}
    digits = (
        Recipe(
            "disback",
            score(guidance=1.0, nodes=4, record_updates=40, backtrack_updates=80),
            {2: FEW, 4: FEW},
            first=WARM,
        ),
    )

    def roles(self) -> dict[str, Role]:
        nodes = range(1, self.config.nodes)
        return {**super().roles(), **{node_role(k): Role(ema_of="fake") for k in nodes}}

    @property
    def part_starts(self) -> tuple[int, ...]:
        return tuple(sorted({*super().part_starts, self.config.recording.stop}))

    def phases(self, step: int) -> Sequence[Phase]:
        """While nodes are recorded the fake's alone; before, in a warm start, the student's."""
        student, fake = super().phases(step)
        recording = self.config.recording
        if step in recording:
            return (replace(fake, name="record", repeat=1),)
        return (student,) if recording and step < recording.start else (student, fake)

    def check_length(self, max_steps: int) -> None:
        super().check_length(max_steps)
        if self.config.nodes and max_steps <= self.config.teacher_from:
            raise ValueError(
                f"{self.name}: expected max_train_steps above {self.config.teacher_from} (the "
                "teacher itself is the target from there on), got "
                f"{max_steps}. Train longer, or lower record_updates or backtrack_updates."
            )

    def after(self, nets: Nets, step: int) -> None:
        for k in self.config.recorded(step):
            nets.ema_update(node_role(k), decay=0.0)

    def scores(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Scores:
        if k := self.config.target(ctx.step):
            nets = nets.carrying("teacher", node_role(k), 1.0)
        return super().scores(nets, batch, ctx, sample)


def node_role(k: int) -> str:
    """The role that stores node k."""
    return f"node_{k}"
