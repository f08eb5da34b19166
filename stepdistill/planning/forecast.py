"""Forecast: what a run would hold in memory and compute, found by running it on fake tensors.

The method's own phases run once each through the real role bank and the stock networks; only
the numbers are missing. Nothing is allocated but small time and noise tensors.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepdistill.config.files import method_class, method_config
from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Method
from stepdistill.core.types import Batch
from stepdistill.families.beside import stand_in
from stepdistill.families.decoder import blank_decoder
from stepdistill.families.family import Family
from stepdistill.families.pictured import PicturedFamily
from stepdistill.families.size import size_fits
from stepdistill.families.vae import is_video_vae
from stepdistill.monitoring.own_validation import PROMPTS, schedule
from stepdistill.monitoring.step_signs import StepSigns
from stepdistill.planning.blueprint import blueprint
from stepdistill.planning.costs import Cost, Forecast
from stepdistill.planning.fakes import fake_mode, fresh
from stepdistill.planning.playback import backward
from stepdistill.planning.quantized import pack
from stepdistill.planning.replay import Replay
from stepdistill.planning.shards import gathered_bytes
from stepdistill.planning.tracker import CostTracker
from stepdistill.rewards import build_scorers
from stepdistill.roles.checkpointing import checkpointed_blocks
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.by_shape import MethodByShape
from stepdistill.training.memory import checkpoint_decoder, checkpoints_activations
from stepdistill.training.optim import moment_bytes
from stepdistill.training.rewards import Rewards, scorers_of
from stepdistill.training.setup import roles_of

# No phase's cost depends on them.
_HELD = {"offload_encoders": False, "optimizer": "adamw"}
PROMPT = "a photograph of an astronaut riding a horse, studio light, highly detailed"


class _PlanCtx(Ctx):
    """Shared draws at their costliest: the most rollout steps, never the null prompt."""

    def shared_randint(self, low: int, high: int) -> int:
        return high - 1

    def shared_rand(self) -> float:
        return 1.0 - 1e-9


def forecast(run: RunConfig) -> Forecast:
    """The forecast of a run's configuration. Errors: as those of training, before any work.

    Runs that differ only in where encoders and moments are held are traced once.
    """
    plain = run.model_copy(update=_HELD)  # without a command's own options
    plan = _traced(plain.model_dump_json(include=set(RunConfig.model_fields)))
    if run.offload_encoders:
        plan = replace(plan, encoders=0, encoding=0)
    if run.optimizer == "adamw_8bit":
        plan = replace(plan, optimizer=plan.optimizer_8bit)
    return plan


@lru_cache(maxsize=8)
def _traced(run_json: str, replay: bool = True) -> Forecast:
    """Args: replay: whether blocks and operations that are alike are run once."""
    run = RunConfig.model_validate_json(run_json)
    dtype = run.frozen_dtype
    config = method_config(run.method, run.method_config)
    family = blueprint(run.pretrained_model_name_or_path, dtype, run.expert)
    size_fits(run.resolution, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method: Method[Any] = method_class(run.method)(config, family.setting_at(run.resolution))
    method.check_length(run.max_train_steps)
    count = sum(p.numel() for p in family.net.parameters())
    if run.tuning.base_quantization != "none":
        pack(family.net, run.tuning.base_quantization)
    specs, decoder = scorers_of(method, run.rewards), None
    with torch.device("meta"), no_init_weights():
        judges: dict[str, Any] = {**build_scorers(specs, {}, "meta", weights=False)}
        if run.decoder is not None and specs:
            decoder = blank_decoder(run.decoder, family.sample_shape()[0]).requires_grad_(False)
        bank = RoleBank(family, roles_of(method, run), run.tuning, judges, decoder)
    if specs and decoder is None:
        checkpoint_decoder(run, family)
    fake = fake_mode()
    _to_fake(bank, fake)
    bank.rebind()
    encoders = [
        part
        for name, part in family.pipeline.components.items()
        if isinstance(part, nn.Module) and name not in (*family.net_parts, *family.side_nets)
    ]
    sides = [*family.side_parts.values()]
    looking = [*judges.values(), *([] if decoder is None else [decoder])]
    vae = getattr(family.pipeline, "vae", None)
    if bank.judged_by_vae and vae is not None:  # it stays where they are
        encoders = [part for part in encoders if part is not vae]
        looking.append(vae)
    for part in (*encoders, *looking, *sides):
        _to_fake(part, fake)
    recomputes = checkpoints_activations(run, family.net)
    if recomputes:
        bank.enable_gradient_checkpointing()
    tracker = CostTracker(remember=replay)
    if replay:
        for net in (*bank.nets.values(), *sides):
            Replay(tracker, fake, bank).wrap(checkpointed_blocks(net))
        for part in (*encoders, *looking):
            if part is not vae or not is_video_vae(part):  # its blocks hand a cache on in place
                Replay(tracker, fake).wrap(_entries(part))
    plan = _measure(run, method, family, bank, encoders, looking, fake, tracker)
    return replace(plan, num_parameters=count, checkpointing=recomputes)


def _measure(
    run: RunConfig,
    method: Method[Any],
    family: Family,
    bank: RoleBank,
    encoders: list[nn.Module],
    judges: list[nn.Module],
    fake: FakeTensorMode,
    tracker: CostTracker,
) -> Forecast:
    role_params = {id(p) for role in bank.roles for p in bank.members(role).values()}
    trained = {r: _size(bank.members(r).values()) for r in bank.trained_roles}
    averaged = sum(_size(bank.members(r).values()) for r, s in bank.roles.items() if s.ema_of)
    held: list[Tensor] = [*bank.parameters(), *bank.buffers()]
    for part in (*encoders, *judges, *family.side_parts.values()):
        held += [*part.parameters(), *part.buffers()]
    tracker.watch(held)
    before = tracker.live
    with tracker:
        batch, encoding = _batch(run, method, family, tracker, fake)
    tracker.live = before + _size(_tensors(batch))
    phases, gradients, rows = [], 0, 0
    rewards = Rewards(run, MethodByShape(method, family, run.resolution))
    last = run.max_train_steps
    parts = pairwise((*(start for start in method.part_starts if start < last), last))
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=run.mixed_precision != "no", cache_enabled=False
    ):
        for since, end in parts:
            carry: dict[str, object] = {}
            for phase in method.phases(since):
                bank.train_only(phase.trains)
                tracker.reset_peak()
                start, flops = tracker.live, tracker.flops
                ctx = _PlanCtx(step=since, phase=phase.name, max_steps=last, carry=carry)
                signs = StepSigns()
                with tracker, bank.watched(signs.see):
                    losses = phase.loss(bank, batch, ctx)
                if (add := rewards.due(phase, 0, batch.shape)) is not None:
                    with tracker, bank.watched(signs.count):
                        losses = add(bank, batch, ctx, losses)
                loss = losses.total.float()
                del losses
                if since == 0:  # a run of ours goes by its first steps, too
                    rows += signs.rows * phase.repeat * run.gradient_accumulation_steps
                del signs
                with tracker:
                    backward(loss)
                del loss
                cost = Cost(phase.name, phase.repeat, tracker.peak - start, tracker.flops - flops)
                phases.append(replace(cost, since=since, share=(end - since) / last))
                gradients = max(gradients, sum(trained[r] for r in phase.trains))
                for param in bank.parameters():
                    param.grad = None
    validation: dict[str, Any] = {}
    if run.validation_steps is None:
        planned = schedule(method, run, rows, PROMPTS, run.max_train_steps)
        named = run.validation_prompts or [PROMPT] * planned.grid.prompts
        validation = planned.said(named, run.max_train_steps)
    gathered, largest = gathered_bytes(bank.nets.values())
    return Forecast(
        model=run.pretrained_model_name_or_path,
        method=run.method,
        num_parameters=0,
        frozen=_size(p for p in bank.parameters() if id(p) not in role_params),
        trained=trained,
        averaged=averaged,
        gradients=gradients,
        optimizer=_moments(bank, "adamw"),
        optimizer_8bit=_moments(bank, "adamw_8bit"),
        beside=sum(_size(part.parameters()) for part in family.side_parts.values()),
        encoders=sum(_size(p.parameters()) for p in encoders),
        judges=sum(_size(p.parameters()) for p in judges),
        encoding=encoding,
        quantization=run.tuning.base_quantization,
        phases=tuple(phases),
        validation=validation,
        largest_block=largest,
        kept_gathered=gathered,
        accumulation=run.gradient_accumulation_steps,
    )


def _batch(
    run: RunConfig,
    method: Method[Any],
    family: Family,
    tracker: CostTracker,
    fake: FakeTensorMode,
) -> tuple[Batch, int]:
    """A batch of fake tensors, and the peak of encoding one of its rows."""
    start, bsz = tracker.live, run.train_batch_size
    tracker.reset_peak()
    shape = family.sample_shape(run.resolution, run.resolution)
    item: Any = PROMPT if family.conditioning == "prompt" else 0
    if isinstance(family, PicturedFamily):
        asked = run.data.conditioning_column is not None
        if asked or family.reference is not None:  # of the run's size, as its data are
            family.reference = stand_in(*family.image_size(run.resolution))
    with torch.no_grad():
        cond = family.encode_at([item], shape)
        null = family.null_for(cond) if family.has_null else family.null(1)
    encoding = tracker.peak - start

    def made() -> Tensor:
        return fresh(fake, (bsz, *shape), torch.float32)

    separate = "real" in method.needs and run.data.gan.source is not None
    x0 = "x0" in method.needs or ("real" in method.needs and not separate)
    batch = Batch(
        cond=cond.repeat(bsz),
        null=null.repeat(bsz),
        shape=shape,
        x0=made() if x0 else None,
        noise=made() if "noise" in method.needs else None,
        prompts=(PROMPT,) * bsz,
        extra={name: made() for name in ("rejected", "start") if name in method.needs},
        gan=(made(), cond.repeat(bsz)) if separate else None,
        easier=(cond.repeat(bsz), null.repeat(bsz)) if "easier" in method.needs else None,
    )
    return batch, encoding


def _moments(bank: RoleBank, optimizer: str) -> int:
    params = [p for role in bank.trained_roles for p in bank.members(role).values()]
    return sum(moment_bytes(param, optimizer) for param in params)


def _tensors(batch: Batch) -> list[Tensor]:
    given = [*batch.cond.tensors.values(), *batch.null.tensors.values()]
    if batch.gan is not None:
        given += [batch.gan[0], *batch.gan[1].tensors.values()]
    for one in batch.easier or ():
        given += one.tensors.values()
    given += batch.extra.values()
    return given + [x for x in (batch.x0, batch.noise) if x is not None]


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _entries(module: nn.Module) -> list[nn.Module]:
    """The entries of a network's outermost module lists."""
    if isinstance(module, nn.ModuleList):
        return [entry for entry in module if entry is not None]  # a place that is left empty
    return [entry for child in module.children() for entry in _entries(child)]


def _to_fake(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replace meta tensors by fake ones that claim to be on the CPU; shared ones stay shared.

    Tables that a module holds as plain attributes count as well (rotary frequencies).
    """
    made: dict[int, Any] = {}

    def faked(old: Any) -> Any:
        if isinstance(old, list):
            return [faked(entry) for entry in old]
        if not isinstance(old, Tensor) or old.device.type != "meta":
            return old
        if id(old) not in made:
            new = fresh(fake, old.shape, old.dtype)
            if isinstance(old, nn.Parameter):  # as nn.Parameter(new) does, without an operation
                new._is_param = True
                new.requires_grad_(old.requires_grad)
            made[id(old)] = new
        return made[id(old)]

    for part in module.modules():
        tables = {k: v for k, v in vars(part).items() if isinstance(v, Tensor | list)}
        vars(part).update({name: faked(table) for name, table in tables.items()})
        stores: tuple[Any, Any] = (part._parameters, part._buffers)
        for store in stores:
            store.update({name: faked(old) for name, old in store.items()})
