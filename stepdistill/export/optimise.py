"""`stepdistill optimise_latent`: an export that makes sound, steered by its first noise (DITTO-2).

All of it is pipelines/optimise_latent.py; here is what a command line says of losses, what can be
wrong with it before a weight is read, and the page.
"""

# Shapes: A audio channels, T samples.

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.options import finite
from stepdistill.core.registry import from_file
from stepdistill.export.card import call_options
from stepdistill.export.pipeline import RECORD
from stepdistill.loading.project_code import optimise_module
from stepdistill.loading.safe_files import load_stock
from stepdistill.loading.source import ModelSource
from stepdistill.reporting.bars import bar
from stepdistill.reporting.blocks import Facts, Text
from stepdistill.reporting.page import Report
from stepdistill.reporting.sound import Sounds, read_wav, write_wav
from stepdistill.reporting.values import counted
from stepdistill.storage.files import read_json
from stepdistill.storage.folders import refuse_foreign, replacing

KINDS = ("keep", "continue", "intensity", "centroid", "structure", "own")


@dataclass(frozen=True)
class Steering:
    """What a command line asks for. See cli/optimise_latent.py; target: of keep and continue."""

    target: str | None = None
    keep: Sequence[str] = ()
    continue_seconds: float | None = None
    intensity: Sequence[str] = ()
    centroid: Sequence[str] = ()
    structure: str | None = None
    loss: str | None = None
    weights: Sequence[str] = ()


def optimise_export(
    folder: str | Path,
    prompt: str,
    output_dir: str | Path,
    steering: Steering,
    iterations: int,
    learning_rate: float,
    surrogate_steps: int,
    seed: int = 0,
    stop_below: float | None = None,
) -> Path:
    """The folder written: before.wav and after.wav of the same seed, optimised.json, report.html.

    Errors: ValueError before a weight is read where the folder makes no sound, for a target at
        another rate, and for losses that can't be read.
    """
    record = read_json(Path(folder) / RECORD, ("num_inference_steps", "load_without", "call"))
    if record.get("output") != "audios":
        raise ValueError(
            f"optimise_latent: expected an export that makes sound, got {folder}. Of images, call "
            "pipelines/optimise_latent.py with a loss of yours."
        )
    vae = read_json(Path(folder) / "vae" / "config.json", ("sampling_rate", "audio_channels"))
    steps = record["num_inference_steps"]
    if surrogate_steps > steps:
        raise ValueError(
            f"surrogate_steps: expected at most the {steps} of this export, got {surrogate_steps}."
        )
    losses = read_losses(steering, vae["sampling_rate"], vae["audio_channels"])
    refuse_foreign(Path(output_dir), "output_dir")
    stock = load_stock(
        folder, ModelSource.of(folder).index, **dict.fromkeys(record["load_without"])
    )
    pipe = optimise_module().OptimiseLatentPipeline.from_pipe(stock)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    call = call_options(record)
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "seed": seed,
        "stop_below": stop_below,
    }
    terms = [(weight, term) for weight, term in losses.values()]
    with bar(total=iterations + 1, desc="optimise", leave=False) as done:
        options["watch"] = lambda i, value: (done.set_postfix(loss=f"{value:.4g}"), done.update())
        result = pipe(
            prompt,
            loss=terms,
            iterations=iterations,
            surrogate_steps=surrogate_steps,
            **options,
            **call,
        )
    # Where that began: the first noise of the seed, drawn as the optimised call draws it.
    noise = torch.randn(result.noise.shape, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    before = pipe(prompt, latents=noise.to(result.noise), generator=generator, **call)
    waves = {"before": before.audios[0].float().cpu(), "after": result.audios[0].float().cpu()}
    made = {
        "model": str(folder),
        "prompt": prompt,
        "losses": {name: weight for name, (weight, _) in losses.items()},
        "history": result.history,
        "lowest": min(result.history),
        "noise_radius": float(result.noise.square().mean().sqrt()),
        "surrogate_steps": surrogate_steps,
        "num_inference_steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    with replacing(Path(output_dir), "output_dir") as aside:
        aside.mkdir()
        write_result(aside, waves, made, vae["sampling_rate"])
    return Path(output_dir)


def write_result(
    folder: Path, waves: Mapping[str, Tensor], made: Mapping[str, Any], rate: int
) -> None:
    """Sounds (A, T), what was measured, and the page of both."""
    for name, wave in waves.items():
        write_wav(folder / f"{name}.wav", wave, rate)
    (folder / "optimised.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    history = made["history"]
    captions = {
        "before": f"the first noise of seed {made['seed']}, loss {history[0]:.4g} after "
        f"{counted(made['surrogate_steps'], 'step')}",
        "after": f"the noise optimised in {len(history) - 1} iterations, loss {made['lowest']:.4g}",
    }
    sounds = [(name, captions[name], folder / f"{name}.wav", waves[name]) for name in waves]
    facts = [
        ("prompt", made["prompt"]),
        ("losses", ", ".join(f"{name} x {weight:g}" for name, weight in made["losses"].items())),
        ("steps", f"{made['surrogate_steps']} to optimise, {made['num_inference_steps']} to hear"),
        ("noise", f"|x| / sqrt(d) = {made['noise_radius']:.3f} (1 is unit noise)"),
    ]
    note = Text("Spectrograms: low notes at the bottom, 80 dB from white to black.")
    page = Report(
        "Optimised first noise", [("Sound", [Sounds(sounds), note]), ("How", [Facts(facts)])]
    )
    (folder / "report.html").write_text(page.html(), encoding="utf-8")


def read_losses(steering: Steering, rate: int, channels: int) -> dict[str, tuple[float, Any]]:
    """name -> (weight, loss) of what is asked for.

    Errors: ValueError for a target at another rate, pairs that are none, and nothing to optimise.
    """
    kinds, losses = optimise_module(), dict[str, Callable[..., Tensor]]()
    reads_target = bool(steering.keep) or steering.continue_seconds is not None
    if reads_target != (steering.target is not None):
        wanted = "a target beside keep or continue_seconds"
        raise ValueError(
            f"target: expected {wanted}, and none without, got {steering.target!r}. "
            "Name a WAV file and what of it stays: --target FILE --keep 0:1.5"
        )
    if steering.target is not None:
        target = read_wav(steering.target, rate, channels)
        if steering.keep:
            losses["keep"] = kinds.Keep(target, pairs("keep", steering.keep))
        if steering.continue_seconds is not None:
            seconds = steering.continue_seconds
            if not 0 < seconds <= target.shape[-1] / rate:
                raise ValueError(
                    f"continue_seconds: expected at most the {target.shape[-1] / rate:g} s of the "
                    f"target, got {seconds:g}."
                )
            losses["continue"] = kinds.Keep.end_of(target, seconds, rate)
    if steering.intensity:
        losses["intensity"] = kinds.Intensity(pairs("intensity", steering.intensity))
    if steering.centroid:
        points = pairs("centroid", steering.centroid)
        if any(hertz <= 0 for _, hertz in points):
            raise ValueError(f"centroid: expected Hz above 0, got {list(steering.centroid)}.")
        losses["centroid"] = kinds.Centroid(points)
    if steering.structure is not None:
        losses["structure"] = kinds.Structure(steering.structure)
    if steering.loss is not None:
        function, _ = from_file(steering.loss, "loss")
        if not callable(function):
            raise ValueError(f"loss: expected FILE.py:FUNCTION of (waves, rate), got {function!r}.")
        losses["own"] = function
    if not losses:
        raise ValueError(
            f"optimise_latent: expected something to steer by ({', '.join(KINDS)}), got nothing. "
            "For a sound as it comes: stepdistill sample."
        )
    weights = dict.fromkeys(losses, 1.0)
    for text in steering.weights:
        name, _, value = text.partition(":")
        if name not in losses:
            raise ValueError(f"weights: expected one of {sorted(losses)}, got {text!r}.")
        weights[name] = _number("weights", value, text)
    return {name: (weights[name], loss) for name, loss in losses.items()}


def pairs(option: str, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Numbers of FIRST:SECOND. Errors: ValueError for any other text."""
    ends = ((text.partition(":"), text) for text in texts)
    return [(_number(option, a, text), _number(option, b, text)) for (a, _, b), text in ends]


def _number(option: str, value: str, text: str) -> float:
    number = finite(value)
    if math.isnan(number):
        raise ValueError(f"{option}: expected two values with a colon, as 0.5:2, got {text!r}.")
    return number
