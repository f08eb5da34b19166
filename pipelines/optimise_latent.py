# Licensed under the Apache License, Version 2.0.
"""Steer a few-step student by its first noise: inpaint, continue or shape a sound (DITTO-2).

The sampler is a function from first noise to sound, so any loss of the sound has a gradient with
respect to that noise. Weights stay as they are:

    x ~ N(0, I);  repeat:  x <- Adam(x, d loss(S_M(x)) / dx);  return S_T(x)

S_M, a surrogate of M steps (one), is what is optimised through; S_T, of T >= M steps, makes what is
returned. A student whose steps are deterministic, or re-noise with the same noise each time (as
here: one seed for all calls), ends near its one-step surrogate.
Source: Novack et al. 2024 (DITTO-2), arXiv:2405.20289; DITTO, arXiv:2401.12179. Neither has a code
release; learning rate, iterations and the losses' units below are ours.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "path/to/student",                   # StableAudioPipeline, AceStepPipeline, ...
        custom_pipeline="pipelines/optimise_latent.py",
        trust_remote_code=True,              # Diffusers asks for it before it runs a local file
    )
    losses = pipe.losses                     # the classes below
    loss = losses.Keep(samples, [(0.0, 1.5)])        # (channels, T) at the model's rate
    sound = pipe("a bell", loss=loss, num_inference_steps=4, guidance_scale=1.0).audios[0]

What comes back IS the stock pipeline of the folder, its call extended (see `_Optimised.__call__`);
without `loss` it is the stock call. `OptimiseLatentPipeline.from_pipe(pipe)` wraps one in memory.

Losses: Keep (in- and outpainting), Intensity (decibels over time), Centroid (brightness over time),
Structure ("ABA"), and any callable of what the pipeline makes: waves (B, A, T), or images. Several
are given as a list of (weight, loss). Any stock class whose call takes `latents` and `output_type`,
and whose scheduler lets gradients through, will do; of images a loss is given what
`output_type="pt"` makes.
"""

# Shapes: B batch, A audio channels, T samples, C channels and L length of latents, W windows.

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

ITERATIONS, RATE = 70, 0.1
SHELL = 0.1  # |x| / sqrt(d) further than this from 1 is told: such noise was never seen
WINDOWS = 64  # of a curve over a sound
Points = Sequence[tuple[float, float]]  # (seconds, value), straight lines between


# ------------------------------------------------------------------------------------- losses
class Keep:
    """Parts of a sound stay as they are; the rest is free. Judged in the autoencoder's latents.

    Args: samples: (A, T) or (B, A, T) in [-1, 1] at the model's rate, cut or padded to its length.
        seconds: (from, to) of each part that is kept.
    Errors: ValueError for a part outside the sound, or without a whole latent in it.
    """

    of_latents = True

    def __init__(self, samples: Tensor, seconds: Sequence[tuple[float, float]]) -> None:
        self.samples, self.seconds = samples, list(seconds)

    @classmethod
    def end_of(cls, samples: Tensor, seconds: float, rate: int) -> Keep:
        """Outpainting: the sound begins with the last `seconds` of samples (A, T)."""
        return cls(samples[..., -round(seconds * rate) :], [(0.0, seconds)])

    @torch.no_grad()
    def prepare(self, vae: Any, like: Tensor) -> None:
        """Args: like: (B, C, L) of latents."""
        rate, hop, length = vae.config.sampling_rate, vae.hop_length, like.shape[-1]
        kept = torch.zeros(length, dtype=torch.bool)
        for start, end in self.seconds:
            if not 0 <= start < end <= length * hop / rate + 1e-6:
                raise ValueError(
                    f"Keep: expected parts within 0 and {length * hop / rate:g} s, got {start:g} "
                    f"to {end:g}."
                )
            # A latent at the edge has heard what is beyond it.
            kept[math.ceil(start * rate / hop - 1e-6) : math.floor(end * rate / hop + 1e-6)] = True
        if not kept.any():
            raise ValueError(
                f"Keep: expected at least {hop / rate:g} s, a whole latent, got {self.seconds}."
            )
        samples = self.samples if self.samples.ndim == 3 else self.samples.unsqueeze(0)
        samples = samples[..., : length * hop]
        samples = F.pad(samples, (0, length * hop - samples.shape[-1]))
        coded = vae.encode(samples.to(vae.device, vae.dtype)).latent_dist.mode()
        self.target, self.kept = coded.to(like), kept.to(like.device)

    def __call__(self, latents: Tensor, rate: int) -> Tensor:
        """Mean square over the kept latents of (B, C, L)."""
        error: Tensor = (latents - self.target)[..., self.kept]
        return error.square().mean()


class Intensity:
    """Loudness over time, RMS in dB of full scale. The loss is in units of 10 dB, squared.

    Args: points: (seconds, dB). (ACE-Step's call sets the loudest sample to -1 dB: there only
    differences count, and the mean is left out by relative=True.)
    """

    def __init__(self, points: Points, relative: bool = False) -> None:
        self.points, self.relative = points, relative

    def __call__(self, waves: Tensor, rate: int) -> Tensor:
        made = loudness(waves)
        wanted = curve(self.points, waves.shape[-1] / rate, made)
        error = made - wanted
        error = error - error.mean(-1, keepdim=True) if self.relative else error
        return (error / 10).square().mean()


class Centroid:
    """Brightness over time: the spectrum's centre in Hz; the loss is in octaves, squared, louder
    moments counting more. Args: points: (seconds, Hz)."""

    def __init__(self, points: Points) -> None:
        self.points = points

    def __call__(self, waves: Tensor, rate: int) -> Tensor:
        made, weight = centroid(waves, rate)
        octaves = (made / curve(self.points, waves.shape[-1] / rate, made)).log2()
        return (weight * octaves.square()).sum() / weight.sum()


class Structure:
    """Sections that are alike or not: cosine similarity of their spectra, the sound's mean taken
    away, 1 for two of the same letter and at most 0 for others. Args: form: a letter each: ABA."""

    def __init__(self, form: str) -> None:
        if len(form) < 2 or len(form) > WINDOWS:
            raise ValueError(f"Structure: expected 2 to {WINDOWS} letters, as ABA, got {form!r}.")
        self.form = form

    def __call__(self, waves: Tensor, rate: int) -> Tensor:
        alike = similarity(waves, len(self.form))
        same = torch.tensor([[a == b for b in self.form] for a in self.form], device=waves.device)
        error = torch.where(same, 1 - alike, alike.clamp_min(0))
        return error.square().mean()


def spectrum(waves: Tensor, windows: int = WINDOWS) -> Tensor:
    """Magnitudes (B, F, W) of waves (B, A, T), mean channel, about `windows` moments."""
    mono, samples = waves.float().mean(1), waves.shape[-1]
    size = 1 << max(4, min(11, (2 * samples // windows).bit_length()))
    size = min(size, 1 << (samples.bit_length() - 1))
    padded = F.pad(mono, (size // 2, size // 2))
    window = torch.hann_window(size, device=waves.device)
    hop = max(size // 2, 1)
    made = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
    # The root's gradient at 0 is infinite: silence too has one.
    return (made.real.square() + made.imag.square() + 1e-8).sqrt()


def loudness(waves: Tensor, windows: int = WINDOWS) -> Tensor:
    """RMS in dB (B, W) of waves (B, A, T), at least -80."""
    power = waves.float().square().mean(1, keepdim=True)
    return 10 * (F.adaptive_avg_pool1d(power, windows).squeeze(1) + 1e-8).log10()


def centroid(waves: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """(centre in Hz, its share of the sound's energy without gradient), both (B, W)."""
    power = spectrum(waves).square()
    hertz = torch.linspace(0, rate / 2, power.shape[1], device=waves.device)[:, None]
    total = power.sum(1)
    return ((power * hertz).sum(1) / total).clamp_min(1.0), total.detach()


def similarity(waves: Tensor, sections: int) -> Tensor:
    """Cosines (B, N, N) between log spectra of N equal sections of waves (B, A, T)."""
    cut = waves[..., : waves.shape[-1] // sections * sections]
    parts = cut.unflatten(-1, (sections, -1)).transpose(1, 2)  # (B, N, A, T / N)
    spectra = spectrum(parts.flatten(0, 1), max(WINDOWS // sections, 2)).log()
    spectra = F.adaptive_avg_pool2d(spectra, (min(spectra.shape[1], 48), spectra.shape[2]))
    rows = spectra.flatten(1).unflatten(0, (-1, sections))
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=-1, eps=1e-6)
    return rows @ rows.mT


def curve(points: Points, seconds: float, like: Tensor) -> Tensor:
    """Values (W,) of straight lines through the points at the middles of W equal windows."""
    known = sorted(points)
    if not known:
        raise ValueError("points: expected (seconds, value) at least once, got none.")
    times, values = (torch.tensor([float(p[i]) for p in known]) for i in (0, 1))
    count = like.shape[-1]
    middles = (torch.arange(count) + 0.5) * seconds / count
    if len(known) == 1:
        return values.expand(count).to(like)
    right = torch.searchsorted(times, middles).clamp(1, len(known) - 1)
    span = (times[right] - times[right - 1]).clamp_min(1e-9)
    share = ((middles - times[right - 1]) / span).clamp(0, 1)
    return (values[right - 1] + share * (values[right] - values[right - 1])).to(like)


# ----------------------------------------------------------------------------------- the call
class _Heard(Exception):
    """Ends a call where its latents are all that is asked for."""


class _Optimised:
    """Laid over a stock class."""

    losses = SimpleNamespace(Keep=Keep, Intensity=Intensity, Centroid=Centroid, Structure=Structure)

    def __call__(
        self,
        *args: Any,
        loss: Any = None,
        iterations: int = ITERATIONS,
        learning_rate: float = RATE,
        surrogate_steps: int = 1,
        stop_below: float | None = None,
        shell: float = 0.0,
        seed: int = 0,
        checkpointing: bool = False,
        watch: Callable[[int, float], object] = lambda i, value: None,
        **kwargs: Any,
    ) -> Any:
        """The stock call's result from noise that was optimised for `loss`.

        Args:
            args, kwargs: of the stock call; num_inference_steps is that of what is returned.
            loss: a loss, or a list of (weight, loss); a loss is called with (waves, rate), or with
                what else the pipeline makes. None: the stock call.
            learning_rate: Adam's, for noise of unit variance.
            stop_below: a loss that is good enough.
            shell: weight of (|x| / sqrt(d) - 1)^2.
            seed: of the first noise, and of all that is drawn between steps.
            checkpointing: the denoiser's activations are made anew for the gradient.
            watch: is called with (iteration, loss).
        Returns: the stock result, with `noise` (the best of all iterations) and `history`.
        Errors: ValueError where no gradient arrives, FloatingPointError for a loss that is no
            number.
        """
        if loss is None:
            return self._stock(*args, **kwargs)
        terms = loss if isinstance(loss, list) else [(1.0, loss)]
        kinds = {bool(getattr(term, "of_latents", False)) for _, term in terms}
        with self._ready(checkpointing), self._encoded_once():
            z, noise = self._first(args, kwargs, seed)
            for _, term in terms:
                prepare = getattr(term, "prepare", None)
                if prepare is not None:
                    prepare(self.vae, z)

            def value(x: Tensor) -> Tensor:
                z, made = self._made(args, kwargs, x, surrogate_steps, seed, False not in kinds)
                rate = getattr(self.vae.config, "sampling_rate", None)
                some = () if rate is None else (rate,)
                parts = [
                    weight * term(z if getattr(term, "of_latents", False) else made, *some).mean()
                    for weight, term in terms
                ]
                total = torch.stack(parts).sum()
                return total + shell * (_radius(x) - 1) ** 2 if shell else total

            best, history = _descend(value, noise, iterations, learning_rate, stop_below, watch)
        off = abs(float(_radius(best)) - 1)
        if off > SHELL:
            warnings.warn(
                f"noise: |x| / sqrt(d) is {off:.2f} from 1, where the model was never trained. "
                "Take fewer iterations, a lower learning_rate, or shell=1.",
                stacklevel=2,
            )
        kwargs = {"num_inference_steps": surrogate_steps, **kwargs}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            result = self._stock(*args, **kwargs, latents=self._typed(best), generator=generator)
        result.noise, result.history = best, history
        return result

    def _stock(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(self._net.dtype)

    @property
    def _net(self) -> Any:
        return self.transformer if "transformer" in self.components else self.unet

    def _first(self, args: Any, kwargs: Any, seed: int) -> tuple[Tensor, Tensor]:
        """(latents that the decoder gets, first noise), of the stock call's shapes."""
        shape = []

        def begin(net: Any, inputs: Any, named: Any) -> None:
            x = named.get("hidden_states", named.get("sample", inputs[0] if inputs else None))
            shape.append(x.shape)

        handle = self._net.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with torch.no_grad():
                z, _ = self._made(args, kwargs, None, 1, seed, True)
        finally:
            handle.remove()
        generator = torch.Generator().manual_seed(seed)
        # A guided call has the denoiser's input twice.
        return z, torch.randn((len(z), *shape[0][1:]), generator=generator).to(z.device)

    def _made(
        self, args: Any, kwargs: Any, x: Tensor | None, steps: int, seed: int, latents_alone: bool
    ) -> tuple[Tensor, Any]:
        """(latents (B, C, L) as decoded, what is made of them) with gradient to x."""
        decode, heard = self.vae.decode, []

        def listening(z: Tensor, *more: Any, **named: Any) -> Any:
            heard.append(z)
            if latents_alone:
                raise _Heard
            return decode(z, *more, **named)

        call = inspect.unwrap(type(self).__mro__[2].__call__)  # without torch.no_grad
        given = {} if x is None else {"latents": self._typed(x)}
        given |= {"num_inference_steps": steps, "output_type": "pt"}
        given["generator"] = torch.Generator().manual_seed(seed)
        self.vae.decode = listening
        try:
            result = call(self, *args, **{**kwargs, **given})
        except _Heard:
            return heard[0].float(), None
        finally:
            del self.vae.decode
        return heard[0].float(), result[0]

    @contextmanager
    def _ready(self, checkpointing: bool) -> Iterator[None]:
        """Within: weights are frozen, no bar is shown, and one step begins at pure noise."""
        kind, config = type(self.scheduler), self.scheduler.config
        if "Cosine" in kind.__name__:
            raise ValueError(
                f"optimise_latent: expected a few-step student's scheduler, got "
                f"{kind.__name__}, of which one step is not a sample. Export a student first."
            )
        saved = self.scheduler, getattr(self, "_progress_bar_config", {})
        if "shift_terminal" in config and config.shift_terminal:  # 0 / 0 of a single step
            self.scheduler = kind.from_config(config, shift_terminal=None)
        parts = [p for p in self.components.values() if isinstance(p, nn.Module)]
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        was_on = getattr(self._net, "is_gradient_checkpointing", False)
        for p in trained:
            p.requires_grad_(False)
        self.set_progress_bar_config(disable=True)
        if checkpointing:
            self._net.enable_gradient_checkpointing()
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
            if checkpointing and not was_on:
                self._net.disable_gradient_checkpointing()
            self.scheduler, self._progress_bar_config = saved

    @contextmanager
    def _encoded_once(self) -> Iterator[None]:
        """Within: the prompt, the same at each iteration, is encoded at the first."""
        encode, made = self.encode_prompt, []

        def once(*args: Any, **kwargs: Any) -> Any:
            if not made:
                with torch.no_grad():
                    made.append(encode(*args, **kwargs))
            return made[0]

        self.encode_prompt = once
        try:
            yield
        finally:
            del self.encode_prompt


def _radius(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _descend(
    value: Callable[[Tensor], Tensor],
    noise: Tensor,
    iterations: int,
    rate: float,
    stop_below: float | None,
    watch: Callable[[int, float], object],
) -> tuple[Tensor, list[float]]:
    """(the x of the lowest value, all values), by Adam from `noise`, whose value comes first."""
    x = noise.float().clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    best, lowest, history = noise, math.inf, []
    for i in range(iterations + 1):
        with torch.enable_grad():
            total = value(x)
        now = float(total.detach())
        if not math.isfinite(now):
            raise FloatingPointError(
                f"optimise_latent: expected a finite loss, got {now} at iteration {i}. Keep the "
                "VAE in float32, or lower learning_rate."
            )
        history.append(now)
        watch(i, now)
        if now < lowest:
            best, lowest = x.detach().clone(), now
        if i == iterations or (stop_below is not None and now < stop_below):
            break
        optimizer.zero_grad()
        if total.grad_fn is not None:
            total.backward()
        if x.grad is None:
            raise ValueError(
                "optimise_latent: expected a loss with a gradient to the first noise, got none. "
                "Use torch operations throughout, and a scheduler that lets gradients through."
            )
        optimizer.step()
    return best, history


@functools.cache
def _over(name: str) -> type:
    """The stock class of that name with the optimised call laid over it, under the stock name, so
    that save_pretrained writes a stock pipeline."""
    stock = getattr(diffusers, name, None)
    takes = inspect.signature(stock.__call__).parameters if isinstance(stock, type) else {}
    if not {"latents", "output_type", "num_inference_steps"} <= set(takes):
        raise ValueError(
            f"optimise_latent: expected a pipeline class of Diffusers whose call takes latents, "
            f"output_type and num_inference_steps, got {name!r}."
        )
    return type(name, (_Optimised, stock), {})


class OptimiseLatentPipeline(DiffusionPipeline):
    """What `custom_pipeline=` finds; making one gives the folder's own class with the new call.

    Use `DiffusionPipeline.from_pretrained(folder, custom_pipeline=this file)` or `from_pipe`.
    """

    _optional_components: ClassVar[list[str]] = [
        *("scheduler", "vae", "transformer", "unet", "projection_model", "condition_encoder"),
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
        *("audio_tokenizer", "audio_token_detokenizer"),
        *("image_encoder", "feature_extractor", "safety_checker"),
    ]

    def __new__(cls, stock_class: str | None = None, **parts: Any) -> Any:
        made = _over(str(stock_class))
        takes = inspect.signature(made.__init__).parameters
        return made(**{key: part for key, part in parts.items() if key in takes})

    def __init__(
        self,
        scheduler,
        vae,
        transformer,
        unet,
        projection_model,
        condition_encoder,
        text_encoder,
        text_encoder_2,
        text_encoder_3,
        tokenizer,
        tokenizer_2,
        tokenizer_3,
        audio_tokenizer,
        audio_token_detokenizer,
        image_encoder,
        feature_extractor,
        safety_checker,
        stock_class=None,
        requires_safety_checker=True,
        force_zeros_for_empty_prompt=True,
        add_watermarker=None,
    ) -> None:
        """Never run: it tells Diffusers which parts a folder may hold. See __new__."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The stock method's answer, and the class named in the folder's model_index.json.

        Errors: ValueError for a class that is not served, before a weight is loaded.
        """
        name = config_dict.get("_class_name")
        _over(str(name))
        known, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**known, "stock_class": name}, unused, hidden

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline in memory with the new call; weights are shared, not copied."""
        return _over(type(pipeline).__name__).from_pipe(pipeline, **kwargs)
