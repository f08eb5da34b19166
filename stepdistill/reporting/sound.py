"""Sound on its way into a file or a page: WAV files, and spectrograms to look at."""

# Shapes: B batch, A audio channels, T samples in [-1, 1], H frequencies, W moments.

from __future__ import annotations

import base64
import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pictures import img, png
from .values import counted

RANGE_DB = 80.0  # below the loudest point: black
LARGEST = 2 << 20  # bytes of a sound in a page
HEIGHT, WIDTH = 128, 384  # of a spectrogram, px, at most


def magnitudes(waves: Tensor, size: int = 512) -> Tensor:
    """(B, size // 2 + 1, W) of waves (B, A, T), their mean channel, Hann windows of `size` samples
    at an eighth of that. Shorter waves are seen through shorter windows."""
    mono = waves.float().mean(1)
    size = min(size, 1 << (mono.shape[-1].bit_length() - 1))
    window = torch.hann_window(size, device=mono.device)
    padded = torch.nn.functional.pad(mono, (size // 2, size // 2))
    hop = max(size // 8, 1)
    made = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
    return made.abs().clamp_min(1e-6)


@torch.no_grad()
def spectrogram(waves: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], low notes at the bottom: decibels below a wave's loudest point."""
    about = round(math.log2(4 * math.sqrt(waves.shape[-1])))  # as fine in pitch as in time
    decibels = 20 * magnitudes(waves, 1 << max(6, min(11, about))).log10()
    decibels = decibels - decibels.amax((1, 2), keepdim=True)
    share = (decibels / RANGE_DB + 1).clamp(0, 1).flip(1).unsqueeze(1)
    fits = (min(share.shape[2], HEIGHT), min(share.shape[3], WIDTH))
    share = torch.nn.functional.adaptive_max_pool2d(share, fits)
    return (2 * share - 1).expand(-1, 3, -1, -1)


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """One wave (A, T) as 16-bit PCM. Args: rate: Hz."""
    integers = (samples.float().clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().cpu()
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[0], 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(integers.numpy().tobytes())


def wav_facts(path: str | Path) -> tuple[int, int, int]:
    """(Hz, channels, samples) of a 16-bit PCM file. Errors: ValueError for any other."""
    try:
        with wave.open(str(path), "rb") as file:
            width, facts = file.getsampwidth(), (file.getframerate(), file.getnchannels())
            count = file.getnframes()
    except (OSError, EOFError, wave.Error) as err:
        raise ValueError(f"{path}: expected a WAV file, got {err or 'none'}.") from err
    if width != 2 or count == 0:
        raise ValueError(
            f"{path}: expected 16-bit PCM, got {8 * width} bit in {counted(count, 'sample')}. "
            "Convert it, for example by ffmpeg -i IN -c:a pcm_s16le OUT.wav."
        )
    return (*facts, count)


def read_wav(path: str | Path, rate: int, channels: int) -> Tensor:
    """(A, T) float32 of a file at that rate; one channel serves for all, all are averaged to one.

    Errors: ValueError for another rate or number of channels.
    """
    its_rate, its_channels, _ = wav_facts(path)
    if its_rate != rate:
        raise ValueError(
            f"{path}: expected sound at {rate} Hz, as the model's, got {its_rate} Hz. Resample it, "
            f"for example by ffmpeg -i IN -ar {rate} -c:a pcm_s16le OUT.wav."
        )
    if its_channels != channels and 1 not in (its_channels, channels):
        raise ValueError(
            f"{path}: expected {counted(channels, 'channel')} or one, got {its_channels}. "
            "Mix it down."
        )
    with wave.open(str(path), "rb") as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    samples = torch.from_numpy(raw.reshape(-1, its_channels).T.astype(np.float32) / 32767)
    return samples.mean(0, keepdim=True) if channels == 1 else samples.expand(channels, -1)


@dataclass(frozen=True)
class Sounds:
    """Spectrograms above what they show. sounds: (label, caption, a WAV file, its wave (A, T)); see
    blocks.Block."""

    sounds: Sequence[tuple[str, str, Path, Tensor]]

    def html(self) -> str:
        """A figure each."""
        return "".join(
            f'<figure class="strip student"><figcaption><b>{escape(label)}</b>'
            f"<span>{escape(caption)}</span></figcaption>"
            f'<div class="lines">{img(png(spectrum_pixels(samples)), f"{label}: spectrogram")}'
            f"{file_audio(file, label)}</div></figure>"
            for label, caption, file, samples in self.sounds
        )


def spectrum_pixels(samples: Tensor) -> NDArray[np.uint8]:
    """(H, W) of one wave (A, T)."""
    share = (spectrogram(samples.unsqueeze(0))[0, 0].cpu().numpy() + 1) / 2
    pixels: NDArray[np.uint8] = (255 * share).round().astype(np.uint8)
    return pixels


def file_audio(path: Path, alt: str) -> str:
    """An <audio> that plays the file, the sound inside the page; empty where it can't be read or is
    larger than LARGEST."""
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    except OSError:
        return ""
    address = f"data:audio/wav;base64,{base64.b64encode(data).decode('ascii')}"
    return f'<audio controls aria-label="{escape(alt)}" src="{address}"></audio>' if data else ""
