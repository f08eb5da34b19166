"""Listen to a stock pipeline's own call: what its denoiser is told, and what is made of its answer.

For pipelines without an adapter (see generic.py). The call runs as it stands; nothing is guessed
from names but the image input (`sample` or `hidden_states`) and `timestep`.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.families.schedule import parity_scheduler

IMAGE_INPUTS = ("sample", "hidden_states")
TEXT = "encoder_hidden_states"
PROBES = ["a cat", "two dogs on a long and winding road"]


class EnoughHeard(Exception):
    """Ends a call before its first denoiser pass is computed."""


@dataclass
class Heard:
    """One call of the pipeline, step by step.

    shown, told, rest: the denoiser's image input, its time, and all other arguments by name.
    raw: its outputs. out, x_t, model_t, mu: what the scheduler was given. coded: the VAE's input.
    """

    shown: list[Tensor] = field(default_factory=list)
    timestep: list[Tensor] = field(default_factory=list)
    rest: list[dict[str, Any]] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    x_t: list[Tensor] = field(default_factory=list)
    model_t: list[float] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    coded: Tensor | None = None
    mu: float | None = None


@contextmanager
def listening(pipeline: Any, net: Any, scheduler: Any, only_encode: bool) -> Iterator[Heard]:
    """Within: a Heard that fills as the pipeline runs with that scheduler.

    Args: only_encode: stop at the first denoiser call (EnoughHeard), before it computes.
    """
    heard, scheduler_before = Heard(), pipeline.scheduler
    signature, step, set_timesteps, decode = (
        inspect.signature(net.forward),
        scheduler.step,
        scheduler.set_timesteps,
        getattr(pipeline.vae, "decode"),  # noqa: B009
    )

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        rest = dict(signature.bind(*args, **kwargs).arguments)
        image = next(name for name in IMAGE_INPUTS if name in rest)
        heard.shown.append(rest.pop(image).detach().clone())
        heard.timestep.append(torch.as_tensor(rest.pop("timestep")).detach().clone())
        heard.rest.append(rest)
        if only_encode:
            raise EnoughHeard

    def after(_module: Any, _args: Any, _kwargs: Any, out: Any) -> None:
        heard.raw.append((out[0] if isinstance(out, tuple) else out.sample).detach())

    def stepped(out: Tensor, t: Any, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        heard.out.append(out)
        heard.x_t.append(x_t)
        heard.model_t.append(float(t))
        made = step(out, t, x_t, *args, **kwargs)
        heard.after.append(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    @functools.wraps(set_timesteps)
    def timed(*args: Any, **kwargs: Any) -> Any:
        heard.mu = kwargs.get("mu")
        return set_timesteps(*args, **kwargs)

    def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        heard.coded = z
        return decode(z, *args, **kwargs)

    handles = (
        net.register_forward_pre_hook(before, with_kwargs=True),
        net.register_forward_hook(after, with_kwargs=True),
    )
    bar = getattr(pipeline, "_progress_bar_config", {})
    scheduler.step, scheduler.set_timesteps = stepped, timed
    pipeline.vae.decode, pipeline.scheduler = decoded, scheduler
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield heard
    finally:
        pipeline.scheduler, pipeline._progress_bar_config = scheduler_before, bar
        del pipeline.vae.decode
        for handle in handles:
            handle.remove()


def hear(
    family: Any, prompts: list[str], guidance: float, steps: int, encode: bool = False
) -> Heard:
    """The family's stock call with our first-order scheduler; encode: no denoiser pass at all."""
    scheduler = parity_scheduler(family)
    generator = torch.Generator().manual_seed(0)
    listen = listening(family.pipeline, family.net, scheduler, encode)
    with torch.no_grad(), listen as heard, suppress(EnoughHeard):
        family.stock_call(prompts, guidance, steps, generator)
    return heard


def image_input(net: Any, inputs: Collection[str]) -> str:
    """The name of a denoiser's image input. Errors: ValueError where its signature is another."""
    images = [name for name in IMAGE_INPUTS if name in inputs]
    if not {"timestep", TEXT} <= set(inputs) or not images:
        raise ValueError(
            f"generic: expected a denoiser of (hidden_states or sample, timestep, "
            f"encoder_hidden_states, ...), got {type(net).__name__} of {sorted(inputs)}. It needs "
            "a family of its own."
        )
    return images[0]


def side_px(family: Any) -> int | None:
    """Side of the model's own images: its network's, else its VAE's (as in VaeSizedFamily)."""
    latent, vae = family.config.get("sample_size"), family.pipeline.vae.config.get("sample_size")
    side = vae if latent is None else latent
    if not isinstance(side, int):  # the default of the stock call
        return None
    return side if latent is None else side * int(family.pipeline.vae_scale_factor)


@dataclass(frozen=True)
class Facts:
    """What an adapter has to know of a denoiser's call.

    shape: (C, H, W). packed: the denoiser and the scheduler see tokens of 2 x 2 latent pixels
    (`pack`). slope, offset: told time = slope k + offset at model time k. rows:
    names of arguments that belong to a prompt; fixed: all others. mu: of a dynamic shift. The
    output's first C channels are the prediction.
    """

    shape: tuple[int, ...]
    slope: float
    offset: float
    rows: tuple[str, ...]
    fixed: dict[str, Any]
    mu: float | None = None
    packed: bool = False

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H W / 4, 4 C) where packed: a token of 2 x 2 pixels, as in Flux."""
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2) if self.packed else latents

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `pack`. Args: shape: (..., H, W)."""
        return unpack(packed, shape) if self.packed else packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, C, H, W) of tokens (B, H W / 4, 4 C). Args: shape: (..., H, W)."""
    rows, columns = (side // 2 for side in shape[-2:])
    return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def learn(family: Any) -> Facts:
    """The facts of an unguided call of two steps. Errors: ValueError for what does not fit."""
    heard = hear(family, PROBES, 1.0, 2)
    x, shown, coded = heard.x_t[0], heard.shown[0], heard.coded
    packed = coded is not None and coded.ndim == 4 and x.ndim == 3
    if coded is not None and packed:
        packed = x[0].numel() == coded[0].numel() and x.shape[2] == 4 * coded.shape[1]
    fits = x.ndim == 4 or packed
    expect(family, "latents (B, C, H, W) or tokens of 2 x 2", fits, f"shape {tuple(x.shape)}")
    same = shown.shape == x.shape and torch.equal(shown, x.to(shown.dtype))
    expect(family, "a denoiser shown x_t as it is", same, f"an input {tuple(shown.shape)}")
    (k0, k1), (time0, time1) = heard.model_t, (float(t.flatten()[0]) for t in heard.timestep)
    slope = (time1 - time0) / (k1 - k0)
    raw, out = heard.raw[0][:, : x.shape[1]].float(), heard.out[0].float()
    fits = raw.shape == out.shape and torch.allclose(raw, out)
    expect(family, "an output that is stepped with as it is", fits, "another use of it")
    vae = family.pipeline.vae
    scale, shift = (vae.config.get(key) for key in ("scaling_factor", "shift_factor"))
    end = heard.after[-1]
    if coded is not None and packed:
        end = unpack(end, coded.shape)
    z = end / (scale or float("nan")) + (shift or 0.0)
    fits = coded is not None and coded.shape == z.shape and torch.allclose(coded, z, atol=1e-4)
    expect(family, "latents decoded at scaling_factor and shift_factor", fits, "others")
    rows, fixed = split(family, heard.rest[0], len(PROBES))
    expect(family, f"rows of {TEXT}", TEXT in rows, f"rows of {sorted(rows)}")
    for i, prompt in enumerate(PROBES):
        alone = pick(hear(family, [prompt], 1.0, 1, encode=True).rest[0], rows)
        shapes = {n: (tuple(alone[n].shape[1:]), tuple(rows[n].shape[1:])) for n in rows}
        fits = all(a == b for a, b in shapes.values())
        expect(family, "every prompt encoded to one length", fits, f"{shapes[TEXT]} for one of two")
        fits = all(torch.allclose(alone[n][0].float(), rows[n][i].float(), atol=1e-4) for n in rows)
        expect(family, "rows that do not depend on their batch", fits, "others")
    offset = time0 - slope * k0
    names = tuple(sorted(rows))
    return Facts(tuple(z.shape[1:]), slope, offset, names, fixed, heard.mu, packed)


def learn_null(family: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The (1, ...) rows of a guided call that belong to no prompt. Errors: see `learn`.

    They stand beside the prompts in one pass of the denoiser, or have a pass of their own.
    """
    bsz = len(PROBES)
    heard, plain = hear(family, PROBES, 3.0, 1), hear(family, PROBES, 1.0, 1, encode=True)
    count = sum(map(len, heard.shown))
    expect(family, "a null row beside each prompt", count == 2 * bsz, f"{count} rows for {bsz}")
    passes = [pick(rest, names) for rest in heard.rest]
    both = {name: torch.cat([each[name] for each in passes]) for name in names}
    cond = pick(plain.rest[0], names)[TEXT].float()
    halves = [torch.allclose(half.float(), cond, atol=1e-4) for half in both[TEXT].chunk(2)]
    expect(family, "one half of a guided batch to be the prompts", any(halves), "neither")
    first = bsz if halves[0] else 0
    return {name: both[name][first : first + 1] for name in names}


def expect(family: Any, rule: str, fits: bool, got: str) -> None:
    """Errors: ValueError with the rule where it does not fit."""
    if not fits:
        raise ValueError(
            f"generic: expected {rule}, got {got} from {type(family.pipeline).__name__}. This "
            "pipeline needs a family of its own (CONTRIBUTING.md, Add a family)."
        )


def split(
    family: Any, rest: Mapping[str, Any], bsz: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors with a row for each prompt, the other arguments) of a denoiser call with B prompts.

    Tensors of dictionaries (added_cond_kwargs) are named "argument.key".
    """
    rows: dict[str, Tensor] = {}
    fixed: dict[str, Any] = {}
    for name, value in flat(rest).items():
        nested = isinstance(value, list | tuple) and any(_is_rows(v, bsz) for v in value)
        expect(family, "one tensor for all prompts", not nested, f"a list in {name!r}")
        (rows if _is_rows(value, bsz) else fixed)[name] = value
    return rows, fixed


def pick(rest: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of a call."""
    every = flat(rest)
    return {name: every[name] for name in names}


def flat(rest: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with those inside dictionaries named "argument.key"."""
    made: dict[str, Any] = {}
    for name, value in rest.items():
        if isinstance(value, Mapping):
            made |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            made[name] = value
    return made


def _is_rows(value: Any, bsz: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == bsz


def placed(value: Any, device: torch.device) -> Any:
    """Tensors, also those in tuples and lists, on the device."""
    if isinstance(value, list | tuple):
        return type(value)(placed(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def joined(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments from named parts: the inverse of `flat`."""
    made: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            outer, dot, key = name.partition(".")
            if dot:
                made.setdefault(outer, {})[key] = value
            else:
                made[name] = value
    return made
