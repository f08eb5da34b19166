"""Is the adapter the stock pipeline? Largest absolute differences of the two, row by row.

The stock pipeline's own `__call__` is run and its denoiser and scheduler are listened to: the
adapter must pass the denoiser the same tensors, get the same output, follow the same guided
trajectory and decode to the same images. Checkpointing must change none of its gradients.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Cond
from stepdistill.families.beside import stand_in
from stepdistill.families.family import Family
from stepdistill.families.references import ReferenceFamily
from stepdistill.families.registry import family_for, load_family
from stepdistill.families.schedule import parity_scheduler
from stepdistill.families.vae import is_video_vae
from stepdistill.loading.source import ModelSource
from stepdistill.roles.checkpointing import uncheckpoint_blocks
from stepdistill.roles.rolebank import RoleBank

LIMIT = 1e-5  # float32; a wrong timestep, null condition or VAE scale is orders above it
GUIDANCE, NUM_STEPS, SEED = 3.0, 4, 0
SMALLEST_REFERENCE = 64  # px, of Flux.2's calls

Row = tuple[str, float]


class Call:
    """One recorded denoiser call: its conditioning tensors by argument name."""

    def __init__(self, net: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(net.forward).bind(*args, **kwargs).arguments
        for name in ("sample", "hidden_states", "timestep"):  # judged by the output
            bound.pop(name, None)
        self.cond = dict(_tensors(bound))


def _tensors(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor, also inside dictionaries and lists (added_cond_kwargs)."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, list | tuple):
            yield from _tensors({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


@dataclass(frozen=True)
class Step:
    """One recorded scheduler step: model time, latents (B, C, *S) before it, denoiser output."""

    model_t: float
    x_t: Tensor
    out: Tensor


@contextmanager
def listen(*nets: nn.Module) -> Iterator[list[Call]]:
    """Within: a list that fills with the calls of a denoiser, or of several."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, _out: Any) -> None:
        calls.append(Call(module, args, kwargs))

    handles = [net.register_forward_hook(hook, with_kwargs=True) for net in nets]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Stock:
    """The stock pipeline under observation, with a first-order scheduler that ends at clean data.

    VP: DDIM with trailing spacing on the checkpoint's own table. Flow: the checkpoint's own Euler
    scheduler, or one with its shift.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.steps: list[Step] = []
        self.final = torch.empty(0)  # latents after the last step, as the pipeline decodes them

    @contextmanager
    def _prepared(self, replace: Tensor | None) -> Iterator[None]:
        pipeline = self.family.pipeline
        saved = {
            name: getattr(pipeline, name, None)
            for name in ("scheduler", "safety_checker", "_progress_bar_config")
        }
        pipeline.scheduler = scheduler = parity_scheduler(self.family)
        step, shape = scheduler.step, self.family.sample_shape()
        self.steps = []

        def observed(out: Tensor, t: Any, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
            unpacked = (self.family.unpack(value, shape) for value in (x_t, out))
            x, raw = unpacked
            times = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
            self.steps.append(Step(float(t), x, self.family.from_raw(raw, x, times)))
            made = step(out, t, x_t, *args, **kwargs)
            if replace is not None:
                packed = self.family.pack(replace)
                some = isinstance(made, tuple)  # a pipeline may read x0, the second entry
                made = (packed,) * len(made) if some else type(made)(prev_sample=packed)
            after = made[0] if isinstance(made, tuple) else made.prev_sample
            self.final = self.family.decoded(self.family.unpack(after, shape))
            return made

        scheduler.step = observed
        if saved["safety_checker"] is not None:
            pipeline.safety_checker = None  # it may blank images; nothing is shown to anyone
        pipeline.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is not None:
                    setattr(pipeline, name, value)

    def run(
        self, prompts: list[Any], guidance: float, num_steps: int, replace: Tensor | None = None
    ) -> tuple[Tensor, list[Call]]:
        """(images (B, C, H, W) in [0, 1], denoiser calls) of the pipeline's own `__call__`.

        Args: replace: latents to put in place of every step's result, to reach the decoder.
        """
        generator = torch.Generator().manual_seed(SEED)
        modes = self.family.encodings(self.family.pipeline)
        with self._prepared(replace), modes, listen(*_nets(self.family)) as calls:
            images = self.family.stock_call(prompts, guidance, num_steps, generator)
        return images, calls


def _nets(family: Family) -> list[nn.Module]:
    """The stock denoisers of the pipeline."""
    return [*family.parts_of(family.net).values()]


def gap(ours: Tensor, stock: Tensor) -> float:
    """Largest absolute difference, in units of the stock's largest value where that is above 1.

    Untrained eps networks leave latents of several hundred at t = 1, where float32 ends at 1e-5.
    """
    stock = stock.double()
    scale = stock.abs().max().clamp_min(1.0)
    return float((ours.double() - stock).abs().max() / scale)


def cond_gap(ours: Call, stock: Call) -> float:
    """Largest difference of the conditioning tensors; infinite where names or shapes differ."""
    shapes = [{name: v.shape for name, v in call.cond.items()} for call in (ours, stock)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max((gap(ours.cond[name], stock.cond[name]) for name in stock.cond), default=0.0)


def as_family(model: Any) -> Family:
    """The Family of a folder or Hub id (loaded in float32), a live pipeline, or a Family."""
    if isinstance(model, str | Path):
        model = load_family(model)
    return model if isinstance(model, Family) else family_for(type(model).__name__)(model)


@torch.no_grad()
def check_family(model: Any) -> list[Row]:
    """(name, max abs difference) of adapter against stock pipeline, in the pipeline's own dtype.

    Args: model: see `as_family`.
    """
    family = as_family(model)
    by_text = family.conditioning == "prompt"
    prompts: list[Any] = ["a red cube", "seven cats"] if by_text else [0, 1]
    prompts = prompts[:1] if family.one_prompt else prompts
    return [
        *_call_rows(family, prompts),
        *_sampling_rows(family, prompts),
        *_vae_rows(family),
        _gradient_row(family, prompts[:1]),
        *_reference_rows(family, prompts),
    ]


def _sends_guidance(family: Family, call: Call) -> bool:
    """Whether the stock call tells the denoiser the guidance, were it through an idle input."""
    return family.embeds_guidance or "timestep_cond" in call.cond


def _call_rows(family: Family, prompts: list[Any]) -> list[Row]:
    """One unguided denoiser call: conditioning tensors, output, decoded image."""
    stock, bsz = Stock(family), len(prompts)
    images, calls = stock.run(prompts, guidance=1.0, num_steps=1)
    first = stock.steps[0]
    device = first.x_t.device
    w = torch.zeros(bsz) if _sends_guidance(family, calls[0]) else None
    with listen(*_nets(family)) as heard:
        out = family.forward(
            family.net,
            first.x_t,
            torch.full((bsz,), first.model_t, dtype=torch.float64, device=device),
            family.encode(prompts).to(device),
            w=None if w is None else w.to(device),
        )
    decoded = (family.images(stock.final) / 2 + 0.5).clamp(0, 1)
    return [
        ("encode: tensors the denoiser gets", cond_gap(heard[0], calls[0])),
        ("denoiser: one call", gap(out, first.out)),
        ("vae: decoded image", gap(decoded, images)),
    ]


def _sampling_rows(family: Family, prompts: list[Any]) -> list[Row]:
    """A guided trajectory over the stock scheduler's own timesteps."""
    stock, bsz = Stock(family), len(prompts)
    scale = GUIDANCE if family.has_null else 1.0
    _, calls = stock.run(prompts, scale, NUM_STEPS)
    path: Any = family.path
    times = tuple(float(path.time_of(step.model_t)) for step in stock.steps)
    noise = stock.steps[0].x_t[:bsz].float() / float(path.prior(torch.ones(())))
    embedded = _sends_guidance(family, calls[0])
    w, guidance = (scale - 1.0, 1.0) if embedded else (None, scale)
    restarts = isinstance(family.pipeline.scheduler, CMStochasticIterativeScheduler)
    spec = SamplerSpec(times, "renoise" if restarts else "ode", w=w)
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    cond = family.encode(prompts).to(noise.device)
    null = family.null(bsz).to(noise.device)
    images = {name: cond[name] for name in family.image_keys if name in null.tensors}
    null = Cond({**null.tensors, **images})  # as stock calls share these
    x0 = sample_x0(
        teacher, spec, noise, cond, null, guidance, fresh_noise=lambda _: torch.zeros_like(noise)
    )
    name = f"sampling: {NUM_STEPS} steps, guidance {scale:g}"
    return [(name, gap(x0, stock.final[:bsz]))]


def _reference_rows(family: Family, prompts: list[Any]) -> list[Row]:
    """The calls, with a reference, of a family that can do without."""
    if not isinstance(family, ReferenceFamily) or family.reference is not None:
        return []
    family.reference = stand_in(max(SMALLEST_REFERENCE, family.size_px))
    try:
        rows = [*_call_rows(family, prompts), *_sampling_rows(family, prompts)]
    finally:
        family.reference = None
    return [(f"with a reference, {name}", value) for name, value in rows]


def _vae_rows(family: Family) -> list[Row]:
    """Our scaled latents through the stock pipeline's decoder, against the VAE alone."""
    prompt: list[Any] = ["a red cube"] if family.conditioning == "prompt" else [0]
    blank = family.images(torch.zeros(1, *family.sample_shape()))
    generator = torch.Generator().manual_seed(SEED)
    images = torch.rand(blank.shape, generator=generator) * 2 - 1
    if family.from_first_frame():  # a video begins with the frame that the stock call is given
        frame = family.pipeline.video_processor.preprocess(family.call_extras["image"])
        images[:, :, 0] = frame
    stock = Stock(family)
    decoded, _ = stock.run(prompt, 1.0, 1, replace=family.latents(images))
    if "vae" not in family.pipeline.components:  # pixels are the latents
        mean = images.mean(1, keepdim=True)
        pixels = (mean if decoded.shape[1] == 1 else images) / 2 + 0.5
        return [("pixels: encode, then stock decode", gap(pixels, decoded))]
    vae = family.pipeline.vae
    grey = images.mean(1, keepdim=True) if vae.config.get("in_channels") == 1 else images
    frames = grey.unsqueeze(2) if is_video_vae(vae) and grey.ndim == 4 else grey
    coded = vae.encode(frames.to(vae.device, vae.dtype))
    mode = coded.latent if "latent" in coded else coded.latent_dist.mode()
    if family.output == "audios":  # a stock call may cut sound and set its loudness
        direct = (family.images(mode) / 2 + 0.5).clamp(0, 1)
        return [("vae: encode, then stock decode", gap(direct, decoded))]
    direct = vae.decode(mode).sample.reshape(images.shape[0], -1, *images.shape[2:])
    return [("vae: encode, then stock decode", gap((direct / 2 + 0.5).clamp(0, 1), decoded))]


@contextmanager
def adapted(family: Family) -> Iterator[RoleBank]:
    """Within: a bank with a LoRA student, both its factors off their start; then the network is
    plain again."""
    net: Any = family.net
    bank = RoleBank(family, {"student": Role(train=True)}, Tuning(rank=2, alpha=3.0))
    generator = torch.Generator().manual_seed(SEED)
    for param in bank.members("student").values():
        param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))
    try:
        yield bank
    finally:
        recurse_remove_peft_layers(net)
        del net.peft_config


def _gradient_row(family: Family, prompts: list[Any]) -> Row:
    """Output and gradients (of x_t and of an adapter) of a call with and without checkpointing, in
    units of each one's largest value."""
    with adapted(family) as bank, torch.enable_grad():
        params = list(bank.members("student").values())
        generator, shape = torch.Generator().manual_seed(SEED), family.sample_shape()
        x_t, weight = torch.randn(2, len(prompts), *shape, generator=generator).to(params[0].device)
        x_t.requires_grad_()
        cond = family.encode(prompts).to(x_t.device)
        t = torch.full((len(prompts),), 0.6, dtype=torch.float64, device=x_t.device)

        def graded() -> list[Tensor]:
            raw = bank["student"](x_t, t, cond).raw
            wrt = [x_t, *params]
            grads = torch.autograd.grad((raw.float() * weight).sum(), wrt, allow_unused=True)
            to_params = [g.float().flatten() for g in grads[1:] if g is not None]
            return [raw.detach(), grads[0], torch.cat(to_params)]

        plain = graded()
        bank.enable_gradient_checkpointing()
        try:
            again = graded()
        finally:
            for net in (family.net, *family.side_parts.values()):
                uncheckpoint_blocks(net)
    worst = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(again, plain, strict=True)
    )
    return "checkpointing: output and gradients", worst


def print_check(
    model: Any,
    base_quantization: str = "none",
    further: Sequence[Callable[[Family], list[Row]]] = (),
) -> int:
    """Prints the rows of `check_family` and of further checks; 0 where all are below the limit,
    else 1."""
    if base_quantization != "none":
        model = load_family(ModelSource(str(model), base_quantization=base_quantization))
    family = as_family(model)
    rows = [*check_family(family), *(row for check in further for row in check(family))]
    table = Table("adapter against stock pipeline", "max abs difference", "")
    for name, value in rows:
        table.add_row(name, f"{value:.1e}", "ok" if value < LIMIT else f">= {LIMIT:g}")
    table.caption = "divided by the stock tensor's largest value where that is above 1"
    Console().print(table)
    return 0 if all(value < LIMIT for _, value in rows) else 1
