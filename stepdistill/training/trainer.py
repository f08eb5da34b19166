"""Trainer: the one loop every method and every family runs in.

    for each student step:
        for each phase of the method, `repeat` times:
            train_only(phase.trains); micro-batches forward and backward; clip per role; update
        method.after (EMA targets), evaluation EMA, log, validate, checkpoint

`step` counts student updates. All randomness is keyed by position (core.context), all data by
position (data.stream), so a resumed run is the run that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.files import method_class, method_config
from stepdistill.config.run import TrainConfig
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Method, MethodConfig, Phase, Scorer
from stepdistill.data.fingerprint import data_facts
from stepdistill.data.stream import as_dataset
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.monitoring.logs import RunLog
from stepdistill.monitoring.validation import Validator
from stepdistill.rewards import build_scorers
from stepdistill.training import checks
from stepdistill.training.batches import batch_maker
from stepdistill.training.feed import Feed
from stepdistill.training.memory import keep_freed_memory, with_quantized_base
from stepdistill.training.optim import (
    clip_by_role,
    reset_roles,
    set_learning_rate,
)
from stepdistill.training.preemption import StopRequest
from stepdistill.training.setup import make_accelerator, make_bank, prepared
from stepdistill.training.sharding import gathered, is_sharded
from stepdistill.training.snapshots import Resumable
from stepdistill.training.start import check_start


class Trainer(Resumable):
    """Distils a teacher pipeline with one method.

    Args:
        model: Diffusers pipeline folder or Hub id, a ModelSource, or a loaded Family.
        method: a name in METHODS; method_options: its Config's fields.
        args: how to train. train_dataset: prompts, or a map-style dataset of dicts with "prompt" or
            "label" and, where the method needs them, "image" (3, H, W) in [-1, 1], "x0", "noise".
            None is enough to resume and export.
        gan_dataset: real samples for the discriminator with their own prompts or labels, where they
            are not the train_dataset's.
        scorers: judges of images by the method's names for them, in place of the built-in ones.
    Errors: ValueError or TypeError for anything wrong with these, before a weight is loaded.
    """

    def __init__(
        self,
        model: str | Path | ModelSource | Family,
        method: str,
        args: TrainConfig,
        train_dataset: Any,
        method_options: Mapping[str, Any] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        gan_dataset: Any = None,
    ) -> None:
        self.args, self.method_name = args, method
        self.teacher = model if isinstance(model, Family) else ModelSource.of(model)
        self.dataset = None if train_dataset is None else as_dataset(train_dataset)
        self.gan_dataset = None if gan_dataset is None else as_dataset(gan_dataset, "gan_dataset")
        config = method_config(method, method_options or {})

        self._check(config, scorers or {})
        self._start_processes()
        self._load(config)
        self._build(scorers or {})
        self._begin()

    def _check(self, config: MethodConfig, scorers: Mapping[str, Scorer]) -> None:
        """What can be said against the run before a weight is loaded."""
        args, cls = self.args, method_class(self.method_name)
        facts = teacher_facts(self.teacher)
        if self.dataset is not None:
            args.check_best_metric()
            data = (self.dataset, scorers, args.best_metric, self.gan_dataset)
            checks.method_fits(cls, config, facts, *data)
        checks.student_fits(cls, args.tuning, self.teacher)
        self.facts = checks.run_facts(self.teacher, self.method_name, config, args)
        if self.dataset is not None:
            self.facts["data"] = data_facts(self.dataset)
        check_start(args, facts, training=self.dataset is not None)
        self.resume_from = checks.output_dir_is_ours(args, self.facts)

    def _start_processes(self) -> None:
        self.accelerator = make_accelerator(self.args)
        self.device = self.accelerator.device
        keep_freed_memory(self.device)
        torch.manual_seed(self.args.seed)  # adapters and heads start alike on every rank

    def _load(self, config: MethodConfig) -> None:
        """The teacher, and the method made for it."""
        args, teacher = self.args, self.teacher
        self.family = (
            teacher
            if isinstance(teacher, Family)
            else load_family(with_quantized_base(teacher, args))
        )
        setting = self.family.setting_at(args.resolution)
        self.method: Method[Any] = method_class(self.method_name)(config, setting)

    def _build(self, scorers: Mapping[str, Scorer]) -> None:
        """The networks by role, wrapped, with their optimiser."""
        training = self.dataset is not None
        # Without data nothing is trained, and nothing judged.
        specs = self.method.scorers() if training else {}
        judges = build_scorers(specs, scorers, self.device)
        self.bank = make_bank(self.family, self.method, self.args, self.device, judges)
        self.module, self.optimizer = prepared(self.accelerator, self.bank, self.args, training)
        self.sharded = is_sharded(self.module)

    def _begin(self) -> None:
        """The position of a run that begins, and what watches it."""
        args = self.args
        self.batches = batch_maker(self.family, self.device, args, self.dataset is not None)
        self.feed = Feed(self.dataset, args)
        self.gan_feed: Feed | None = None
        reads_real = self.gan_dataset is not None and "real" in self.method.needs
        if reads_real and self.dataset is not None:
            self.gan_feed = Feed(self.gan_dataset, args, "gan")
            self.facts["data"]["gan"] = data_facts(self.gan_dataset)
        self.step = 0
        self.seconds = 0.0
        self.stop = StopRequest()
        self.log = RunLog(self.accelerator, args, self.facts)
        self.validator = Validator(self.bank, self.method, args)
        self.facts["teacher_guidance"] = self.validator.guidance

    # ------------------------------------------------------------------ loop
    def train(self, until: int | None = None) -> dict[str, float]:
        """Run to max_train_steps, max_train_seconds, SIGTERM or SIGUSR1; returns the last means.

        Args: until: pause after that many updates in all, saved; the next call goes on, and what is
            planned over max_train_steps (learning rates, stages) does not notice.
        Errors: WatchdogStop (a FloatingPointError) for a non-finite loss or gradient, or where
            another check of args.watchdog stops the run; it names the last good checkpoint.
            Whatever ends the run, Ctrl-C too, is told in events.jsonl and the report.
        """
        with self.stop:
            try:
                return self._train(until)
            except BaseException as err:
                self.log.broken_off(self.step, err)
                raise

    def _train(self, until: int | None) -> dict[str, float]:
        args = self.args
        end = args.max_train_steps if until is None else min(until, args.max_train_steps)
        if self.dataset is None:
            raise ValueError("train: expected a train_dataset, got None (enough only to export).")
        if self.resume_from is not None:
            self.resume(self.resume_from)
            self.resume_from = None
        for feed in self.feeds:
            feed.open(self.batches.disk, self.accelerator)
        started, before = time.monotonic(), self.seconds
        self.log.start(self.step, self.seconds)
        last_saved = self.step
        if args.validation_steps and self.step == 0:
            self.validate()  # the student before training, which later ones are held against
        while self.step < end:
            scale = self.method.learning_rate_scale(self.step, args.max_train_steps)
            set_learning_rate(self.optimizer, args, self.step, self.seconds, scale)
            self.log.watchdog.scale_rates(self.optimizer)
            anew = self.method.resets(self.step, args.max_train_steps)
            reset_roles(self.bank, self.optimizer, anew)
            carry: list[dict[str, object]] = [{} for _ in range(args.gradient_accumulation_steps)]
            for phase in self.method.phases(self.step):
                for repeat in range(phase.repeat):
                    self._update(phase, repeat, carry)
            self.method.after(self.bank, self.step)
            if args.ema_decay:
                # Early steps average over fewer, as the zero-th would otherwise never be forgotten.
                self.bank.ema_update("ema", min(args.ema_decay, (1 + self.step) / (10 + self.step)))
            self.step += 1
            stopping, self.seconds = self.stop.agreed(
                before + time.monotonic() - started, args.max_train_seconds, self.accelerator
            )
            last = self.step >= end or stopping
            if self.log.due(self.step) or last:
                self.log.write(self.step, self.seconds, self._learning_rates())
            better = False
            if args.validation_steps and (self.step % args.validation_steps == 0 or last):
                better = self.validate()
            due = args.checkpointing_steps and self.step % args.checkpointing_steps == 0
            if (due or last or better) and self.step > last_saved:
                self.save()
                last_saved = self.step
            if better:
                self.log.keep_best()
            if stopping:
                break
        done = "paused" if end < args.max_train_steps else "finished"
        self.log.close(self.step, "preempted" if self.stop.preempted else done)
        for feed in self.feeds:
            if feed.corrupt.replaced:
                self.accelerator.print(f"data: replaced unreadable samples: {feed.corrupt}")
        return self.log.last

    @property
    def feeds(self) -> list[Feed]:
        """The run's data sources."""
        return [self.feed] if self.gan_feed is None else [self.feed, self.gan_feed]

    def _update(self, phase: Phase, repeat: int, carry: list[dict[str, object]]) -> None:
        """One optimiser update of one phase."""
        args, accelerator = self.args, self.accelerator
        real = phase.reads_real and "real" in self.method.needs
        gan_feed = self.gan_feed if real else None
        with_x0 = phase.reads_x0 or (real and gan_feed is None)
        feeds = [self.feed] if gan_feed is None else [self.feed, gan_feed]
        self.bank.train_only(phase.trains)
        self.optimizer.zero_grad(set_to_none=True)
        for micro, kept in enumerate(carry):
            batch = self.batches(next(self.feed), with_x0, next(gan_feed) if gan_feed else None)
            ctx = Ctx(
                seed=args.seed,
                step=self.step,
                max_steps=args.max_train_steps,
                phase=phase.name,
                repeat=repeat,
                micro=micro,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                device=self.device,
                carry=kept,
                mean_over_ranks=self._mean_over_ranks,
                draw_law=self.facts["draw_law"],
            )
            more = micro + 1 < len(carry)
            with accelerator.no_sync(self.module) if more else nullcontext():
                total, logs = self.module(phase.loss, batch, ctx)
                accelerator.backward(total / len(carry))
            for feed in feeds:
                logs = {**logs, **feed.logs(total.detach())}
            self.log.add(phase.name, self.step, total.detach(), logs)
        accelerator.unscale_gradients(self.optimizer)
        norms = clip_by_role(self.bank, phase.trains, args.max_grad_norm, args.role_max_grad_norm)
        if self.log.allows(norms, self.step):
            self.optimizer.step()

    def _mean_over_ranks(self, x: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return x
        mean: Tensor = self.accelerator.reduce(x.detach(), reduction="mean")
        return mean

    def _learning_rates(self) -> dict[str, float]:
        return {group["role"]: group["lr"] for group in self.optimizer.param_groups}

    # ------------------------------------------------------- state and output
    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def student(self) -> Denoiser:
        """The network to use: the averaged student where the run keeps one."""
        return self.bank["ema" if "ema" in self.bank else "student"]

    def validate(self) -> bool:
        """Grid and metrics of this step (main process); returns whether it is the best so far."""
        self.accelerator.wait_for_everyone()
        found = None
        with gathered(self.module):
            if self.accelerator.is_main_process:
                spec = self.method.sampler_at(self.step, self.args.max_train_steps)
                found = self.validator.run(self.student(), spec, self.step)
        better = self.log.validation(found, self.step, self.seconds)
        self.accelerator.wait_for_everyone()
        return better
