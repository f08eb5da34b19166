"""Sounds made here: short melodies of one timbre in one register and rhythm, with a caption.

A melody draws each note from the three of its register, and each note its loudness, so that a
caption stands for many sounds. Everything follows from (seed, index).
"""

# Shapes: T samples, N notes.

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RATE, HOP, LENGTH = 4000, 64, 64  # Hz; samples to a latent; latents to a sound, 1.024 s
SAMPLES = HOP * LENGTH
START = 96  # samples of silence that a lapped transform needs at the edges

# (harmonic, amplitude, decays a second)
TIMBRES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "flute": ((1, 1.0, 0.5), (2, 0.15, 0.5)),
    "reed": ((1, 0.8, 0.5), (3, 0.5, 0.5), (5, 0.3, 0.5)),
    "bell": ((1, 0.8, 6.0), (2.76, 0.6, 9.0), (5.4, 0.3, 14.0)),
    "string": tuple((k, 0.9 / k, 2.0) for k in range(1, 9)),
}
REGISTERS = {
    "low": (131.0, 147.0, 165.0),
    "middle": (262.0, 294.0, 330.0),
    "high": (523.0, 587.0, 659.0),
}
RHYTHMS = {
    "slow": (0, 15, 30, 45),
    "quick": (0, 7, 15, 22, 30, 37, 45, 52),
    "dotted": (0, 11, 15, 30, 41, 45),
}
ATTACK = {"flute": 0.02, "reed": 0.01, "bell": 0.002, "string": 0.04}  # seconds
KINDS: tuple[tuple[str, str, str], ...] = tuple(product(TIMBRES, REGISTERS, RHYTHMS))
WORDS = ("a", "playing", "notes", *REGISTERS, *TIMBRES, *RHYTHMS)


def caption(kind: int) -> str:
    """Of one of KINDS."""
    timbre, register, rhythm = KINDS[kind]
    return f"a {register} {timbre} playing {rhythm} notes"


@cache
def note(timbre: str, hertz: float, samples: int) -> NDArray[np.float32]:
    """One note of unit loudness, faded in and out, always in the same phase."""
    time = np.arange(samples) / RATE
    wave = np.zeros(samples)
    for harmonic, amplitude, decay in TIMBRES[timbre]:
        if harmonic * hertz < 0.475 * RATE:
            wave += amplitude * np.sin(2 * np.pi * harmonic * hertz * time) * np.exp(-decay * time)
    fade = np.minimum(1, time / ATTACK[timbre]) * np.minimum(1, time[::-1] / 0.01)
    made: NDArray[np.float32] = (wave * fade / np.abs(wave).max()).astype(np.float32)
    return made


def sound(kind: int, seed: int, index: int) -> NDArray[np.float32]:
    """(T,) in [-1, 1]."""
    timbre, register, rhythm = KINDS[kind]
    draw = np.random.default_rng((seed, index, kind))
    wave, onsets = np.zeros(SAMPLES, np.float32), (*RHYTHMS[rhythm], LENGTH - 4)
    for begin, end in pairwise(onsets):
        first, count = START + begin * HOP, (end - begin) * HOP
        hertz, loudness = draw.choice(REGISTERS[register]), draw.uniform(0.4, 0.8)
        wave[first : first + count] += loudness * note(timbre, float(hertz), count)
    return wave


def sounds(kinds: Sequence[int], seed: int, first: int = 0) -> Tensor:
    """(B, 1, T), one of each kind."""
    made = np.stack([sound(kind, seed, first + i) for i, kind in enumerate(kinds)])
    return torch.from_numpy(made).unsqueeze(1)
