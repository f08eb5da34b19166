"""A user's setup: any served pipeline as the teacher, methods by their config files, `evaluate` as
the judge.

The same for every method: teacher, prompts, data, batch size, precision, tuning and guidance, where
they are given. Everything else is as `stepdistill train` settles it: a small model's recipe, or the
method's own config file under the model's own guidance.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch

from stepdistill.config.files import method_class, method_config
from stepdistill.config.layers import merge
from stepdistill.config.recipes import Training
from stepdistill.core.method import COMMON_DATA
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.evaluation.learned import FeatureSettings, enough_images, train_features
from stepdistill.evaluation.metrics import System
from stepdistill.evaluation.options import Options
from stepdistill.evaluation.run import evaluate, open_judges
from stepdistill.families.registry import teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.methods import METHODS
from stepdistill.methods.digits import WARM
from stepdistill.methods.gan import PIXELS
from stepdistill.methods.warm_start import WarmStartedConfig
from stepdistill.pairs.dataset import PairDataset
from stepdistill.pairs.teacher import make_pairs
from stepdistill.training.checks import method_fits, roles_fit, student_fits
from stepdistill.training.start import check_start

from .students import StepsServed, Student
from .teacher_setup import TEACHER_ROWS, Plain, TeacherSetup
from .user_options import UserOptions
from .user_settings import settle

NETWORK_LINE = "heads on a network of train_data_dir's images, made once in OUTPUT_DIR/features"
WARM_SHARE = 0.4  # of the budget of a student that starts on pairs

# What a pair is like, before the first is made.
PAIR = [{"prompt": "a", "x0": torch.zeros(1), "noise": torch.zeros(1)}]


class PromisedNetwork:
    """Stands, where settings are checked, for the pixel network that `equipped` makes later."""

    blocks: tuple[str, ...] = ()

    def features(self, *_: Any) -> Any:
        raise AssertionError("of settings that are checked alone")

    __call__ = features


class UserTeacher(TeacherSetup):
    """See the module."""

    threads = None
    only_claims = False

    def __init__(self, out: Path, options: UserOptions) -> None:
        super().__init__(out)
        self.own = options
        self._settled: dict[str, dict[str, Any]] = {}
        facts = teacher_facts(options.teacher)
        sound = facts.family.output == "audios"
        if facts.conditioning != "prompt" or facts.needs_images or sound:
            raise ValueError(
                f"compare: expected a teacher of images told by prompts alone, got "
                f"{options.teacher!r}. Train each method by itself and use stepdistill evaluate."
            )

    def teacher(self) -> str:
        return self.own.teacher

    def pairs_guidance(self) -> float:
        return 1.0 if self.own.guidance is None else self.own.guidance

    def check(self, chosen: Sequence[Student]) -> None:
        facts, source = teacher_facts(self.own.teacher), ModelSource.of(self.own.teacher)
        open_judges(self._options([]), torch.device("cpu"))
        if self.own.train_data_dir is not None:  # whether or not a method reads it
            ImageFolderDataset(self.own.train_data_dir, self.own.resolution, labels=False)
        for student in chosen:
            for training in self.trainings(student):
                method, args, config = self.configs(training, 1000)
                data = PAIR if training.data == "pairs" else self.dataset(training)
                scorers: dict[str, Any] = {}
                try:
                    if self._makes_network(training):
                        enough_images(str(self.own.train_data_dir))
                        scorers = {PIXELS: PromisedNetwork()}
                        lines = self.reasons[student.recipe]
                        lines += [] if NETWORK_LINE in lines else [NETWORK_LINE]
                    fits: dict[str, Any] = {"scorers": scorers, "rewards": args.rewards}
                    method_fits(method_class(method), config, facts, data, **fits)
                    student_fits(method_class(method), args.tuning, source)
                    roles_fit(method_class(method), config, args, facts)
                    check_start(args, facts, training=True)
                except ValueError as err:
                    raise ValueError(f"methods: {student.recipe}: {err}") from err

    def _makes_network(self, training: Training) -> bool:
        return training.lacks_network and self.own.train_data_dir is not None

    def equipped(self, training: Training) -> Training:
        """With a pixel network of the training images, another than the judges', where its heads
        read one that nobody named."""
        if not self._makes_network(training):
            return training
        images, out = str(self.own.train_data_dir), self.out / "features"
        judges = {Path(name).name for name in self.own.features}
        made = (train_features(images, out, FeatureSettings(seed=seed)) for seed in count(1))
        return training.with_network(next(one for one in made if one.name not in judges))

    def prepare(self, needs_pairs: bool) -> None:
        options = self.own

        def pairs() -> None:
            make_pairs(
                options.teacher,
                options.prompts_file,
                self.out / "pairs",
                num_pairs=options.num_pairs,
                num_steps=options.pair_steps,
                guidance=self.pairs_guidance(),
                resolution=options.resolution,
            )

        if needs_pairs:
            self.pairs_made(pairs, time.perf_counter)
        if not (self.out / TEACHER_ROWS).is_file():
            report = evaluate(self._options([]))
            rows = [plain(one, one.label, report.reference, self.out) for one in report.systems]
            (self.out / TEACHER_ROWS).write_text(json.dumps(rows))

    def _options(self, student: Sequence[str]) -> Options:
        options = self.own
        return Options(
            teacher=options.teacher,
            student=tuple(student),
            prompts_file=options.prompts_file,
            output_dir=str(self.out / "evaluation"),
            teacher_steps=tuple(options.teacher_steps),
            features=tuple(options.features),
            reference=options.reference,
            guidance=options.guidance,
            resolution=options.resolution,
            **options.eval_options,
        )

    def steps_served(self, methods: Sequence[str]) -> dict[str, StepsServed]:
        chosen = {name: METHODS[self.settings(name)["method"]] for name in methods}
        for name, cls in chosen.items():
            if cls.data not in COMMON_DATA:
                raise ValueError(
                    "methods: expected methods that learn from prompts, images or the teacher's "
                    f"pairs, got {name}, which learns from {cls.data}. Train it by itself, and "
                    "judge it with stepdistill evaluate."
                )
        return {name: StepsServed.of_method(cls) for name, cls in chosen.items()}

    def students(self, methods: Sequence[str], steps: Sequence[int] | None) -> list[Student]:
        return super().students(methods, steps or (1, 2, 4))

    def settings(self, name: str) -> dict[str, Any]:
        """A method's settings under what is the same for all, settled once; see `reasons`."""
        if name not in self._settled:
            made = settle(self.own, name, self.own.methods.get(name))
            self._settled[name], self.reasons[name] = made
        return self._settled[name]

    def trainings(self, student: Student) -> list[Training]:
        settings = self.settings(student.recipe)
        method = METHODS[settings["method"]]
        settings = merge(settings, {"method_config": method.for_steps(student.trained_for)})
        settings.setdefault("max_train_steps", 1000)
        data = method.data
        if data == "images" and self.own.train_data_dir is None:
            data = "pairs"  # whose images the teacher made
        # A file of the user's is trained as `train` has it.
        if self.own.methods.get(student.recipe) or not self._starts_on_pairs(settings):
            return [Scaled(student.recipe, settings, data)]
        regression = METHODS[WARM.method]
        options = regression.for_steps(student.trained_for)
        ours = settle(self.own, WARM.method, None)[0]  # whatever file the user has for it
        first = merge(ours, {"tuning": settings["tuning"], "method_config": options})
        settings = merge(settings, {"method_config": {"warm_start": {"updates": 0}}})
        return [
            Scaled(WARM.label, first, regression.data, WARM_SHARE),
            Scaled(student.recipe, settings, data, 1.0 - WARM_SHARE, "student"),
        ]

    def _starts_on_pairs(self, settings: Mapping[str, Any]) -> bool:
        """Whether a method's start on the teacher's trajectories is better made on the pairs, as
        DMD2's for one step: they are there already, and an update costs one call in place of
        seventeen. Not where the pairs are another teacher's, of other guidance or times."""
        method = METHODS[settings["method"]]
        options = method_config(settings["method"], settings.get("method_config", {}))
        if not isinstance(options, WarmStartedConfig) or not options.warm_start.updates:
            return False
        guidance = {*method.guidance_of(options)}
        return options.student_times is None and guidance == {self.pairs_guidance()}

    def dataset(self, training: Training) -> Any:
        if training.data == "prompts":
            return PromptDataset.from_file(self.own.prompts_file)
        if training.data == "images" and self.own.train_data_dir is not None:
            return ImageFolderDataset(self.own.train_data_dir, self.own.resolution, labels=False)
        return PairDataset(self.out / "pairs")

    def judge(self, label: str, steps: int, folder: Path) -> Plain:
        report = evaluate(self._options([str(folder)]))
        return plain(report.systems[-1], label, report.reference, self.out)


class Scaled(Training):
    """A config file's training, shortened: warm-up takes at most a tenth of it."""

    def lasting(self, updates: int) -> dict[str, Any]:
        """See Training."""
        made = super().lasting(updates)
        warm = min(int(made.get("lr_warmup_steps", 0)), updates // 10)
        return merge(made, {"lr_warmup_steps": warm})


def plain(system: System, label: str, reference: str, out: Path) -> Plain:
    """A row of `evaluate` as a row of the comparison in `out`, in its first feature network."""
    row: Plain = {
        "label": label,
        "group": system.group,
        "steps": system.steps,
        "previews": [os.path.relpath(path, out) for path in system.previews],
        "noise_seeds": 1,
    }
    for name in ("frechet", "recall"):
        value = system.get(name, reference=reference)
        row[name] = None if value is None else asdict(value)
    for name, other in (("network_calls", ""), ("seconds_per_image", "seconds_per_video")):
        value = system.get(name) or system.get(other)
        row[name] = None if value is None else value.mean
    return row
