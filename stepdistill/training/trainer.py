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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepdistill.config.files import method_class, method_config
from stepdistill.config.method_names import resolve_method
from stepdistill.config.run import TrainConfig
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Method, MethodConfig, Phase, Scorer
from stepdistill.core.stopping import Stopped
from stepdistill.data.fingerprint import data_facts
from stepdistill.data.source import fitted
from stepdistill.data.stream import as_dataset
from stepdistill.families import FAMILIES
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.size import size_fits
from stepdistill.loading.source import ModelSource
from stepdistill.methods import METHODS
from stepdistill.monitoring.logs import RunLog
from stepdistill.monitoring.own_validation import OwnValidation
from stepdistill.monitoring.validation import Validator
from stepdistill.rewards import build_scorers
from stepdistill.storage.files import one_line
from stepdistill.storage.owner import refuse_owned
from stepdistill.storage.ranks import MISTAKES, agreed, owned_by_first
from stepdistill.training import checks, run_identity
from stepdistill.training.batches import batch_maker
from stepdistill.training.by_shape import MethodByShape
from stepdistill.training.feed import Feed
from stepdistill.training.memory import keep_freed_memory, with_quantized_base
from stepdistill.training.optim import (
    clip_by_role,
    reset_roles,
    set_learning_rate,
)
from stepdistill.training.preemption import StopRequest
from stepdistill.training.rewards import Rewards, scorers_of
from stepdistill.training.setup import make_accelerator, make_bank, prepared
from stepdistill.training.sharding import gathered, is_sharded
from stepdistill.training.snapshots import Resumable
from stepdistill.training.start import check_start

Carried = dict[tuple[int, ...], dict[str, object]]  # shape -> what phases leave for such batches


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
        scorers: judges of images by the method's or the rewards' names for them, in place of the
            built-in ones.
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
        self.args, self.method_name = args, resolve_method(method)[0]
        self.teacher = model if isinstance(model, Family) else ModelSource.of(model)
        self.dataset = None if train_dataset is None else as_dataset(train_dataset)
        self.gan_dataset = None if gan_dataset is None else as_dataset(gan_dataset, "gan_dataset")
        config = method_config(method, method_options or {})

        if self.dataset is None:  # perhaps in one process of several
            self._check(config, scorers or {})
        else:
            agreed(lambda: self._check(config, scorers or {}))
        self._start_processes()
        self._load(config)
        self._build(scorers or {})
        self._begin()

    def _check(self, config: MethodConfig, scorers: Mapping[str, Scorer]) -> None:
        """What can be said against the run before a weight is loaded."""
        args, cls = self.args, method_class(self.method_name)
        run_identity.teacher_is_here(args, self.teacher)
        facts = teacher_facts(self.teacher)
        if self.dataset is not None:
            refuse_owned(self.output_dir, "output_dir")  # an export may read it meanwhile
            args.check_best_metric()
            data = (self.dataset, scorers, args.best_metric, self.gan_dataset, args.rewards)
            checks.method_fits(cls, config, facts, *data, args.resolution)
            checks.run_fits(cls, config, args, facts)
            checks.frames_fit(self.dataset, facts, args.resolution)
            checks.buckets_fit(self.dataset, self.gan_dataset, facts)
        checks.student_fits(cls, args.tuning, self.teacher)
        checks.roles_fit(cls, config, args, facts)
        training = self.dataset is not None
        check_start(args, facts, training)
        self.facts = run_identity.run_facts(self.teacher, self.method_name, config, args, training)
        files = {"method_file": METHODS.files.get(self.method_name)}
        files |= {"family_file": FAMILIES.files.get(facts.family.name)}
        self.facts |= {name: file for name, file in files.items() if file is not None}
        if training:
            self.facts["data"] = data_facts(self.dataset)
            states: Any = getattr(self.dataset, "settings", None)
            if getattr(states, "until", 0.0):  # of a high-noise expert's student
                self.facts["high_student"] = states.model
        self.resume_from = run_identity.output_dir_is_ours(args, self.facts)

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
        if self.dataset is not None:
            size_fits(args.resolution, self.family)
        setting = self.family.setting_at(args.resolution)
        self.method: Method[Any] = method_class(self.method_name)(config, setting)

    def _build(self, scorers: Mapping[str, Scorer]) -> None:
        """The networks by role, wrapped, with their optimiser."""
        training = self.dataset is not None
        # Without data nothing is trained, and nothing judged.
        specs = scorers_of(self.method, self.args.rewards) if training else {}
        judges = build_scorers(specs, scorers, self.device)
        self.bank = make_bank(self.family, self.method, self.args, self.device, judges)
        self.module, self.optimizer = prepared(self.accelerator, self.bank, self.args, training)
        self.sharded = is_sharded(self.module)

    def _begin(self) -> None:
        """The position of a run that begins, and what watches it."""
        args = self.args
        self.batches = batch_maker(self.family, self.device, args, self.dataset is not None)
        size = (self.family.image_size(args.resolution), self.family.size_multiple)
        beside = self.family.px_beside
        self.by_shape = MethodByShape(self.method, self.family, args.resolution)
        self.rewards = Rewards(args, self.by_shape)
        easier = "easier" in self.method.needs
        self.feed = Feed(fitted(self.dataset, *size, beside, easier), args)
        self.gan_feed: Feed | None = None
        reads_real = self.gan_dataset is not None and "real" in self.method.needs
        if reads_real and self.dataset is not None:
            self.gan_feed = Feed(fitted(self.gan_dataset, *size, beside), args, "gan")
            self.facts["data"]["gan"] = data_facts(self.gan_dataset)
        self.step = 0
        self.seconds = 0.0
        self.owes_validation = False  # a signal came before it or in it
        self.stop = StopRequest()
        self.log = RunLog(self.accelerator, args, self.facts)
        self.validator = Validator(self.bank, self.method, args)
        self.own_validation = OwnValidation(args, self.method, self._unvalidated())
        self.facts["teacher_guidance"] = self.validator.guidance

    def _unvalidated(self) -> str:
        """Why no run like this is validated unless that is asked for; "" where it is."""
        if self.sharded:
            return (
                "weights in shards would be gathered on one device; --validation_steps asks for it"
            )
        if self.family.expert != "both":
            return "one expert of two makes no images"
        return "its model needs an image beside the prompt" if self.family.needs_images() else ""

    # ------------------------------------------------------------------ loop
    def train(self, until: int | None = None) -> dict[str, float]:
        """Run to max_train_steps, max_train_seconds or a signal (SIGTERM, SIGUSR1, Ctrl-C); returns
        the last means.

        Args: until: pause after that many updates in all, saved; the next call goes on, and what is
            planned over max_train_steps (learning rates, stages) does not notice.
        Errors: WatchdogStop (a FloatingPointError) for a non-finite loss or gradient, or where
            another check of args.watchdog stops the run; it names the last good checkpoint.
            ValueError where another process trains in output_dir. An error of the data or of a
            validation comes once the step before it is saved.
            Whatever ends the run is told in events.jsonl and the report.
        """
        with self.stop.within(), owned_by_first(self.output_dir, "output_dir"):
            try:
                return self._train(until)
            except Stopped:  # nothing is in work
                self.stop.preempted = True
                self.stop.tell(self.accelerator)
                self.log.preempted(self.step)
                return self.log.last
            except BaseException as err:
                self.log.broken_off(self.step, err)
                raise
            finally:
                for feed in self.feeds:
                    feed.close()

    def _train(self, until: int | None) -> dict[str, float]:
        args = self.args
        end = args.max_train_steps if until is None else min(until, args.max_train_steps)
        if self.dataset is None:
            raise ValueError("train: expected a train_dataset, got None (enough only to export).")
        with self.stop.at_once():
            if self.resume_from is not None:
                self.resume(self.resume_from)
                self.resume_from = None
            for feed in self.feeds:
                feed.open(self.batches.disk, self.accelerator)
            agreed(lambda: self._read_ahead(end), (*MISTAKES, RuntimeError))
        started, before = time.monotonic(), self.seconds
        self.log.start(self.step, self.seconds)
        last_saved = self.step
        planned = self.own_validation.args.validation_steps
        if (args.validation_steps and self.step == 0) or (planned and self.owes_validation):
            # The student before training, which later ones are held against, or what a signal cut.
            better, failure = self._validate()
            if failure is not None:
                raise failure
            if better:
                self.log.keep_best()
            if self.stop.preempted:
                raise Stopped
        while self.step < end:
            scale = partial(self.method.learning_rate_scale, self.step, args.max_train_steps)
            set_learning_rate(self.optimizer, args, self.step, self.seconds, scale)
            self.log.watchdog.scale_rates(self.optimizer)
            anew = self.method.resets(self.step, args.max_train_steps)
            reset_roles(self.bank, self.optimizer, anew)
            carry: list[Carried] = [{} for _ in range(args.gradient_accumulation_steps)]
            for phase in self.method.phases(self.step):
                for repeat in range(phase.repeat):
                    self._update(phase, repeat, carry)
            self.method.after(self.bank, self.step)
            if args.ema_decay:
                # Early steps average over fewer, as the zero-th would otherwise never be forgotten.
                self.bank.ema_update("ema", min(args.ema_decay, (1 + self.step) / (10 + self.step)))
            self.step += 1
            failure = self._next_failure(end)
            stopping, self.seconds = self.stop.agreed(
                before + time.monotonic() - started,
                args.max_train_seconds,
                self.accelerator,
                failure is not None,
            )
            self.log.advance(self.step, self.seconds)
            cut_off = self.stop.preempted or self.stop.failed
            last = self.step >= end or stopping
            if self.log.due(self.step) or last:
                self.log.write(self.step, self.seconds, self._learning_rates())
            if self.own_validation.due(self.step):
                self._decide_validation()
            watching = self.own_validation.args
            better, planned = False, validates(watching, self.step)
            self.owes_validation = planned and cut_off
            if (planned or (watching.validation_steps and last)) and not cut_off:
                better, failure = self._validate()
                stopping = stopping or self.stop.preempted or failure is not None
            due = args.checkpointing_steps and self.step % args.checkpointing_steps == 0
            if (due or last or better or stopping) and self.step > last_saved:
                self.save()
                last_saved = self.step
            if better:
                self.log.keep_best()
            if failure is not None:
                raise failure
            if self.stop.failed:
                raise RuntimeError(
                    "data: expected every process to read its next batch, got another one's error, "
                    "which it has told. The run is saved."
                )
            if stopping:
                break
        done = "paused" if end < args.max_train_steps else "finished"
        self.log.close(self.step, "preempted" if self.stop.preempted else done)
        for feed in self.feeds:
            if feed.corrupt.replaced:
                self.accelerator.print(f"data: replaced unreadable samples: {feed.corrupt}")
        return self.log.last

    def _decide_validation(self) -> None:
        """Settle on validations by the rows of the steps so far; the same on all ranks."""
        said = self.own_validation.decide(self.step, self.seconds)
        state = broadcast_object_list([self.own_validation.state_dict()])[0]
        self.own_validation.load_state_dict(state)
        self.facts["validation"] = said
        self._validate_by(said)

    @property
    def feeds(self) -> list[Feed]:
        """The run's data sources."""
        return [self.feed] if self.gan_feed is None else [self.feed, self.gan_feed]

    def _gan_feed_of(self, phase: Phase) -> Feed | None:
        """Where a phase's real samples come from, if not from the run's own data."""
        return self.gan_feed if phase.reads_real and "real" in self.method.needs else None

    def _read_ahead(self, end: int) -> None:
        """Have the batches of a whole step in memory: where one can't be read, no phase of the step
        has changed anything yet, and the step before it can be saved."""
        if self.step >= end:
            return
        for feed in self.feeds:
            phases = self.method.phases(self.step)
            taken = [p.repeat for p in phases if feed is self.feed or self._gan_feed_of(p)]
            feed.read_ahead(sum(taken) * self.args.gradient_accumulation_steps)

    def _next_failure(self, end: int) -> Exception | None:
        try:
            self._read_ahead(end)
        except Exception as err:
            return err
        return None

    def _update(self, phase: Phase, repeat: int, carry: list[Carried]) -> None:
        """One optimiser update of one phase."""
        args, accelerator = self.args, self.accelerator
        real = phase.reads_real and "real" in self.method.needs
        gan_feed = self._gan_feed_of(phase)
        with_x0 = phase.reads_x0 or (real and gan_feed is None)
        feeds = [self.feed] if gan_feed is None else [self.feed, gan_feed]
        self.bank.train_only(phase.trains)
        self.optimizer.zero_grad(set_to_none=True)
        for micro, carried in enumerate(carry):
            raw = next(self.feed)
            batch = self.batches(raw, with_x0, next(gan_feed) if gan_feed else None)
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
                carry=carried.setdefault(batch.shape, {}),
                mean_over_ranks=self._mean_over_ranks,
                draw_law=self.facts["draw_law"],
            )
            more = micro + 1 < len(carry)
            asked: tuple[Any, ...] = (self.by_shape.loss(phase, batch), batch, ctx)
            if (rewards := self.rewards.due(phase, self.step, batch.shape)) is not None:
                asked = (*asked, rewards)
            with accelerator.no_sync(self.module) if more else nullcontext():
                total, logs = self.module(*asked)
                accelerator.backward(total / len(carry))
            self.own_validation.see(raw, ctx.rows)
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
        better, failure = self._validate()
        if failure is not None:
            raise failure
        return better

    def _validate(self) -> tuple[bool, Exception | None]:
        """Grid and metrics of this step (main process); call on all ranks.

        Returns: whether it is the best so far; what went wrong, on all ranks. Where a signal cut it
        short, on the main process, stop.preempted is set and a resumed run validates first.
        """
        self.accelerator.wait_for_everyone()
        result, failure, self.owes_validation = None, None, False
        with gathered(self.module):
            if self.accelerator.is_main_process:
                spec = self.method.sampler_at(self.step, self.args.max_train_steps)
                try:
                    with self.stop.at_once():
                        result = self.validator.run(self.student(), spec, self.step)
                except Stopped:
                    self.stop.preempted = True
                except Exception as err:
                    failure = err
        shared = [self.stop.preempted, None if failure is None else one_line(failure)]
        self.stop.preempted, message = broadcast_object_list(shared)
        if self.stop.preempted:
            self.stop.tell(self.accelerator)
        if self.stop.preempted or message is not None:
            if (
                message is not None and self.own_validation.chosen
            ):  # nobody asked for it: go on without
                self.own_validation.leave()
                self.facts["validation"] = {"steps": 0, "why": f"it failed: {message}"}
                self._validate_by(self.facts["validation"])
                return False, None
            self.owes_validation = validates(self.own_validation.args, self.step)
            failed = None if message is None else RuntimeError(f"validation: {message}")
            return False, failure or failed
        better = self.log.validation(result, self.step, self.seconds)
        self.accelerator.wait_for_everyone()
        return better, None


def validates(args: TrainConfig, step: int) -> bool:
    """Whether a validation is planned there."""
    steps = args.validation_steps or 0
    return steps > 0 and step % steps == 0
