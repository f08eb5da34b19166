"""The trainer classes: one per family of methods, all thin names over the one loop.

from stepdistill import DistributionMatchingTrainer, TrainConfig

trainer = DistributionMatchingTrainer(
    model="path-or-hub-id", method="dmd2", args=TrainConfig(max_train_steps=300),
    train_dataset=["a photo of a cat", "a photo of a dog"],
)
trainer.train()
trainer.export("out/pipeline")
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from stepdistill.config.files import method_class, parse_run_config
from stepdistill.config.files import method_config as parse_method_config
from stepdistill.config.flags import ending_early, mistakes_in_one_line
from stepdistill.config.method_names import resolve_method
from stepdistill.config.run import RunConfig, TrainConfig
from stepdistill.core.method import Scorer
from stepdistill.core.solvers import SamplerSpec
from stepdistill.families import FAMILIES
from stepdistill.families.family import Family
from stepdistill.loading.quiet import quieten
from stepdistill.loading.source import ModelSource
from stepdistill.methods import METHODS
from stepdistill.monitoring.validation import validate
from stepdistill.monitoring.watchdog import WatchdogStop
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.storage.files import RUN_FILE, read_json
from stepdistill.storage.folders import refuse_foreign
from stepdistill.storage.own_code import recorded
from stepdistill.storage.ranks import refusing_together
from stepdistill.training.checkpoint import named_checkpoint
from stepdistill.training.opening import closing_line, opening_lines
from stepdistill.training.run_identity import teacher_is_here
from stepdistill.training.sources import open_dataset, open_gan_dataset
from stepdistill.training.trainer import Trainer


class DistillationTrainer(Trainer):
    """Base of the facades: checks that the method belongs to the class, and exports.

    It serves every method that names the same trainer as its `default` one; this class itself
    those that name no other.
    """

    default: ClassVar[str] = ""

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The methods it serves, by name."""
        trainer = METHODS[cls.default].trainer if cls.default else DistillationTrainer.__name__
        return tuple(name for name, method in METHODS.items() if method.trainer == trainer)

    def __init__(
        self,
        model: str | Path | ModelSource | Family,
        args: TrainConfig,
        train_dataset: Any,
        method: str | None = None,
        method_config: Mapping[str, Any] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        gan_dataset: Any = None,
    ) -> None:
        method, method_config = resolve_method(method or self.default, method_config)
        if method not in self.methods():
            raise ValueError(
                f"{type(self).__name__}: expected one of {self.methods()}, got {method!r}. "
                f"Use {trainer_class(method).__name__}."
            )
        self.check_model(model, method, method_config)
        parts = (method_config, scorers, gan_dataset)
        super().__init__(model, method, args, train_dataset, *parts)

    @classmethod
    def check_model(cls, model: Any, method: str, options: Mapping[str, Any]) -> None:
        """Errors: ValueError where its methods can't start from that model as it was exported."""

    @classmethod
    def from_config(cls, run: RunConfig) -> DistillationTrainer:
        """The trainer a RunConfig describes, its data source opened."""
        teacher_is_here(run, run.source)
        return trainer_class(run.method)(
            model=run.source,
            args=run.train_config(),
            train_dataset=open_dataset(run),
            gan_dataset=open_gan_dataset(run),
            method=run.method,
            method_config=run.method_config,
        )

    def export(
        self,
        out_dir: str | Path,
        num_steps: int | None = None,
        format: Literal["pipeline", "lora", "diffusers", "kohya", "comfyui"] = "pipeline",
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        high_student: str | Path | None = None,
    ) -> Path:
        """Write the distilled student for stock Diffusers; returns the folder.

        Args:
            num_steps: a step count of the grid that training reached; none means the run's own.
            format: "pipeline" (for DiffusionPipeline.from_pretrained), "lora" or its other name
                "diffusers" (load_lora_weights), "kohya" (A1111, sd-scripts, ComfyUI), "comfyui".
            dtype: of a LoRA file; none means bfloat16. A pipeline has the weights' own.
            high_student: a pipeline export of the high-noise expert's run, which a low-noise
                student's pipeline needs; none means that whose states it was trained on.
        Errors: ValueError for steps off the trained grid, an adapter format of a full student, or
            one that the model's network has no keys in.
        """
        from stepdistill.export.lora import LORA_FORMATS

        form = "lora" if format == "diffusers" else format
        if form not in ("pipeline", *LORA_FORMATS):
            raise ValueError(
                f"export: expected a format of {('pipeline', 'diffusers', *LORA_FORMATS)}, got "
                f"{format!r}."
            )
        if dtype is not None and form == "pipeline":
            raise ValueError(
                f"export: expected dtype with a LoRA format alone, got {dtype} with format "
                "pipeline, which keeps the weights' own. Load it with torch_dtype."
            )
        if self.sharded and not (self.output_dir / f"checkpoint-{self.step}").is_dir():
            self.save()
        if self.accelerator.is_main_process:
            # Networks in shards are put together from the checkpoint, on this process alone.
            source = trainer_of_run(self.output_dir) if self.sharded else self
            source._export(Path(out_dir), num_steps, form, dtype or "bfloat16", high_student)
        self.accelerator.wait_for_everyone()
        return Path(out_dir)

    def _export(
        self,
        out_dir: Path,
        num_steps: int | None,
        form: str,
        dtype: str,
        high_student: str | Path | None,
    ) -> None:
        from stepdistill.export.lora import export_lora
        from stepdistill.export.pipeline import export_pipeline
        from stepdistill.export.sampler_at_stop import sampler_at_stop

        role = "ema" if "ema" in self.bank else "student"
        spec = sampler_at_stop(self.method, self.step, self.args.max_train_steps, num_steps)
        facts = {**self.facts, "step": self.step, "seconds": round(self.seconds, 1)}
        where = (self.family, self.bank, spec, out_dir, facts, role)

        def add(folder: Path) -> None:
            self._add_samples(folder, spec)

        if form == "pipeline":
            shown = not self.args.disable_progress_bar
            high = high_student or facts.get("high_student")
            export_pipeline(*where, high_student=high, add=add, progress=shown)
        else:
            export_lora(*where, format=form, dtype=dtype, add=add)

    def _add_samples(self, folder: Path, spec: SamplerSpec) -> None:
        """Put a grid of the validation prompts, and the run's metrics.json, beside an export."""
        from stepdistill.export.hub_card import METRICS, SAMPLES

        if self.args.validation_prompts and self.family.expert == "both":
            validate(self.student(), self.family, spec, self.args, folder / SAMPLES)
        if (self.output_dir / METRICS).is_file():
            (folder / METRICS).write_bytes((self.output_dir / METRICS).read_bytes())

    def push_to_hub(
        self, repo_id: str, folder: str | Path | None = None, private: bool = True
    ) -> str:
        """Upload an export (made first where `folder` is None) with a card; returns its URL.

        Args: private: visibility where the repository does not exist yet.
        Errors: ValueError for files other than safetensors and text, or a token in one of them.
        """
        from stepdistill.export.hub import push_folder

        folder = folder or self.export(self.output_dir / "pipeline")
        if not self.accelerator.is_main_process:
            return repo_id
        return push_folder(folder, repo_id, private)


class AdversarialTrainer(DistillationTrainer):
    """Adversarial distillation by heads on the teacher's features (LADD) or on a pixel network
    (ADD)."""

    default = "ladd"


class ConsistencyTrainer(DistillationTrainer):
    """Consistency models of discrete (CD, LCM, ECT, SCott) and of continuous time (MeanFlow, sCM,
    rCM, SANA-Sprint), and the trajectory bootstrapped from prompts alone (BOOT)."""

    default = "consistency"


class DistributionMatchingTrainer(DistillationTrainer):
    """Distribution matching distillation (DMD2, DMD) and its f-divergences (f-distill)."""

    default = "dmd2"


class LoRADistillationTrainer(DistillationTrainer):
    """Guidance distillation into an adapter or a copy, then progressive halving of the steps."""

    default = "lora_guidance"

    @classmethod
    def check_model(cls, model: Any, method: str, options: Mapping[str, Any]) -> None:
        """See DistillationTrainer; its guidance would count twice in a student that has it."""
        from stepdistill.export.load import refuse_double_guidance

        config: Any = parse_method_config(method, options)
        refuse_double_guidance(model, config.guidance)


class PreferenceTrainer(DistillationTrainer):
    """What people (PSO), or their stand-ins, scorers (online PSO, feedback), prefer, for a student
    that is distilled already."""

    default = "preference"

    @classmethod
    def check_model(cls, model: Any, method: str, options: Mapping[str, Any]) -> None:
        """See DistillationTrainer; PSO's model is sampled by its own scheduler."""
        from stepdistill.export.load import refuse_other_sampling

        if not method_class(method).any_student:
            config: Any = parse_method_config(method, options)
            refuse_other_sampling(model, config.num_steps, config.call_times is not None)


class ReflowTrainer(DistillationTrainer):
    """Rectified flow on noise-image pairs: reflow, rf++, SlimFlow, one-step distillation."""

    default = "reflow"


class SuperResolutionTrainer(DistillationTrainer):
    """Super-resolution in one step, distilled from one factor to the next (YONOS-SR)."""

    default = "scale_distill"


class TrajectorySegmentedTrainer(DistillationTrainer):
    """Trajectory-segmented consistency (TSCD, TCD), phased (PCM) and trajectory models (CTM)."""

    default = "tscd"


class VariationalScoreTrainer(DistillationTrainer):
    """Variational score distillation (VSD, SwiftBrush) from prompts alone."""

    default = "vsd"


TRAINERS: tuple[type[DistillationTrainer], ...] = (
    DistillationTrainer,
    AdversarialTrainer,
    ConsistencyTrainer,
    DistributionMatchingTrainer,
    LoRADistillationTrainer,
    PreferenceTrainer,
    ReflowTrainer,
    SuperResolutionTrainer,
    TrajectorySegmentedTrainer,
    VariationalScoreTrainer,
)


def trainer_class(method: str) -> type[DistillationTrainer]:
    """The trainer that a method names. Errors: ValueError where there is none of that name."""
    cls, named = method_class(method), {trainer.__name__: trainer for trainer in TRAINERS}
    if cls.trainer not in named:
        raise ValueError(f"{cls.name}: expected a trainer of {[*named]}, got {cls.trainer!r}.")
    return named[cls.trainer]


def launch(argv: Sequence[str], trainer: type[DistillationTrainer]) -> None:
    """What the launchers in train/ run: `train_run` of the files and flags, of its methods alone.

    Exit statuses: those of `stepdistill train`.
    """
    quieten()
    with mistakes_in_one_line(), ending_early(), refusing_together():
        run: RunConfig = parse_run_config(
            argv, prog="accelerate launch", method=trainer.default, early=True, by_size=True
        )
        if resolve_method(run.method)[0] not in trainer.methods():
            raise ValueError(
                f"{trainer.__name__}: expected one of {trainer.methods()}, got method "
                f"{run.method!r}. Use that method's launcher, or `stepdistill train`."
            )
        train_run(run)


def ended_run(run: RunConfig) -> DistillationTrainer:
    """Train to the end; returns the trainer.

    Errors: SystemExit 75 where a signal stopped it, saved; 76 where the watchdog did.
    """
    running = DistillationTrainer.from_config(run)
    running.accelerator.print("\n".join(opening_lines(running, run.reasons)))
    try:
        running.train()
    except WatchdogStop as stop:
        print("stopped: " + " ".join(str(stop).split()), file=sys.stderr)
        sys.exit(stop.status)
    if running.stop.preempted:
        sys.exit(running.stop.status)
    return running


def train_run(run: RunConfig) -> None:
    """Train, export, push when asked. Errors: see `ended_run`."""
    export_dir = Path(run.export_dir or Path(run.output_dir) / "pipeline")
    refuse_foreign(export_dir, "export_dir")  # not after a week's training
    running = ended_run(run)
    folder = running.export(export_dir)
    if running.accelerator.is_main_process:
        running.log.report()  # which says how to try what is there
    running.accelerator.print(f"exported {folder}")
    running.accelerator.print(closing_line(running, folder))
    if run.push_to_hub and run.hub_model_id:
        running.push_to_hub(run.hub_model_id, folder)


def trainer_of_run(run_dir: str | Path, name: str | None = None) -> DistillationTrainer:
    """The trainer of a finished or stopped run, at its newest whole checkpoint.

    Args: name: "best", or checkpoint-N, in place of the newest.
    Errors: ValueError where the folder holds no run or no (such) whole checkpoint.
    """
    folder = Path(run_dir)
    saved = folder / RUN_FILE
    checkpoint, skipped = newest_valid(folder)
    if name is not None:
        checkpoint, skipped = named_checkpoint(folder, name), []
    if not saved.is_file() or checkpoint is None:
        raise ValueError(
            f"run_dir: expected a run with a whole checkpoint, got {folder}. " + " ".join(skipped)
        )
    keys = ("method", "model", "train_config", "method_config")
    facts = read_json(saved, keys)
    recorded(METHODS, "method", facts, saved)
    recorded(FAMILIES, "family", facts, saved)
    if facts["method"] not in METHODS:
        raise ValueError(f"{saved}: expected a method of {sorted(METHODS)}, got another.")
    trainer = trainer_class(facts["method"])(
        model=ModelSource.of_run(facts),
        args=TrainConfig(
            **{
                **TrainConfig.recorded(facts["train_config"]),
                "output_dir": str(folder),
                "resume_from_checkpoint": "latest",
                # The checkpoint holds the student, or its adapter on a base of its own.
                "init_student_from": facts.get("student_base"),
            }
        ),
        train_dataset=None,
        method=facts["method"],
        method_config=facts["method_config"],
    )
    if "high_student" in facts:
        trainer.facts["high_student"] = facts["high_student"]
    for line in skipped:
        trainer.accelerator.print(f"{folder}: {line}")
    trainer.restore(checkpoint)
    return trainer
