"""A recipe of several trainings, read as the runs that it stands for, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config.files import parse_run_config
from stepdistill.config.flags import taken
from stepdistill.config.layers import TrainingOfRecipe, trainings_of
from stepdistill.config.run import RunConfig


@dataclass(frozen=True)
class SeveralTrainings:
    """A recipe of several trainings under a user's files and flags.

    argv: those, without the recipe's name. runs: each training's options before what the others
    make is there; output_dir is the folder of them all.
    """

    recipe: str
    parts: dict[str, TrainingOfRecipe]
    argv: Sequence[str]
    prog: str
    runs: dict[str, RunConfig] = field(init=False)

    def __post_init__(self) -> None:
        runs = {name: self._parsed(name) for name in self.parts}  # mistakes in any, before all
        object.__setattr__(self, "runs", runs)
        self._check()

    @property
    def given(self) -> RunConfig:
        """What the user says of every training; its own options are the first one's."""
        return next(iter(self.runs.values()))

    @property
    def folder(self) -> Path:
        """Of all trainings."""
        return Path(self.given.output_dir)

    def pairs_of(self, name: str) -> Path | None:
        """The folder of the pairs that a training learns from, where they are made for it."""
        pairs = self.parts[name].pairs
        if pairs is None:
            return None
        return self.folder / (pairs if isinstance(pairs, str) else name) / "pairs"

    def model_of(self, name: str) -> str:
        """The model of a training: the one that is named, or the export of another training."""
        other = self.parts[name].model_of
        return str(self.export_of(other)) if other else self.given.pretrained_model_name_or_path

    def export_of(self, name: str) -> Path:
        """The pipeline of a training: of the last one, where the user says."""
        last = [*self.parts][-1]
        if name == last and self.given.export_dir:
            return Path(self.given.export_dir)
        return self.folder / ("" if name == last else name) / "pipeline"

    def run(self, name: str) -> RunConfig:
        """The run of a training, whose model, student and pairs are there by now."""
        part, seconds = self.parts[name], self.given.max_train_seconds
        flags = ["--output_dir", str(self.folder / name), "--resume_from_checkpoint", "latest"]
        flags += ["--pretrained_model_name_or_path", self.model_of(name)]
        if part.student_of:
            flags += ["--init_student_from", str(self.folder / part.student_of)]
        if pairs := self.pairs_of(name):
            flags += ["--data.prompts_file", "null", "--data.pairs_dir", str(pairs)]
        if seconds is not None:
            share = part.share or 1.0 / len(self.parts)
            flags += ["--max_train_seconds", f"{seconds * share:g}"]
        run = self._parsed(name, *flags)
        return run.model_copy(update={"push_to_hub": False, "hub_model_id": None})

    def _parsed(self, name: str, *flags: str) -> RunConfig:
        argv = ["--recipe", f"{self.recipe}/{name}", *self.argv, *flags]
        return parse_run_config(argv, self.prog, early=True, by_size=True)

    def _check(self) -> None:
        """Errors: ValueError for what can hold for one training alone."""
        where, given = f"recipe {self.recipe}", self.given
        if given.init_student_from is not None:
            raise ValueError(
                f"{where}: expected no init_student_from, as its trainings begin at each other, "
                f"got {given.init_student_from!r}. Leave it out, or name one training: "
                f"--recipe {self.recipe}/{next(iter(self.parts))}."
            )
        if given.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"{where}: expected resume_from_checkpoint none or latest, as each training goes "
                f"on at its own, got {given.resume_from_checkpoint!r}."
            )
        if any(part.pairs for part in self.parts.values()) and given.data.prompts_file is None:
            raise ValueError(
                f"{where}: expected --data.prompts_file, of which it makes pairs, got "
                f"{given.data.source}."
            )


def parse_trainings(argv: Sequence[str], prog: str) -> SeveralTrainings | None:
    """What `--recipe NAME ...` describes where that recipe is several trainings; else None.

    Errors: ValueError for whatever is wrong in one of them, before a weight is loaded.
    """
    recipe, rest = taken(argv, "recipe")
    about = trainings_of(recipe) if recipe else None
    if about is None or recipe is None or {"-h", "--help"} & {*rest}:
        return None
    return SeveralTrainings(recipe, about.trainings, rest, prog)
