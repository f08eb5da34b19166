"""An AutoencoderOobleck set by hand so that decode(encode(x)) = x, with no training.

Its strided convolutions have windows of two strides: as many as a lapped transform's, so they can
hold the MDCT with a sine window and its inverse (Princen and Bradley 1986), here divided by each
channel's spread. Residual branches vanish with their last convolution, snakes with 1 / beta; the
first and last half window has no neighbour and is not reproduced.
"""

# Shapes: C channels of latents, which is also the stride.

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderOobleck
from torch import Tensor, nn

from stepdistill.demo.sound.data import HOP, RATE

NO_SNAKE = 60.0  # log beta
NO_SPREAD = -30.0  # before the softplus of the posterior's spread


def mdct(hop: int = HOP) -> Tensor:
    """(C, 2 C) float64, orthonormal over the whole signal: row k, C = hop."""
    n, k = torch.arange(2 * hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)
    window = (math.pi / (2 * hop) * (n + 0.5)).sin()
    waves = (math.pi / hop * (n + 0.5 + hop / 2) * (k[:, None] + 0.5)).cos()
    return math.sqrt(2 / hop) * window * waves


def to_latents(waves: Tensor, spread: Tensor) -> Tensor:
    """(B, C, L) of waves (B, 1, T): what the autoencoder's many zeros take longer for.

    Args: spread: (C,) of the coefficients.
    """
    hop = len(spread)
    weight = (mdct(hop) / spread[:, None]).float().unsqueeze(1)
    return nn.functional.conv1d(waves, weight, stride=hop, padding=hop // 2)


@torch.no_grad()
def mdct_vae(spread: Tensor, rate: int = RATE) -> AutoencoderOobleck:
    """One audio channel, C latent channels and a stride of C samples.

    Args: spread: (C,) of the coefficients, which the latents are divided by.
    """
    hop = len(spread)
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * hop,
        downsampling_ratios=[hop],
        channel_multiples=[1],
        decoder_channels=hop,
        decoder_input_channels=hop,
        audio_channels=1,
        sampling_rate=rate,
    )
    for name, param in vae.named_parameters():
        if name.endswith(("weight_g", "bias", "alpha")):
            param.zero_()
        elif name.endswith("beta"):
            param.fill_(NO_SNAKE)
    transform = mdct(hop)
    unit = torch.eye(hop, dtype=torch.float64)
    first, last = (
        torch.zeros(2 * hop, 1, dtype=torch.float64),
        torch.zeros(1, hop, dtype=torch.float64),
    )
    first[0], last[0, 0] = 1.0, 1.0
    encoder, decoder = vae.encoder, vae.decoder
    _set(encoder.conv1, _centre(first, 7))
    analysis = torch.zeros(2 * hop, 2 * hop, 2 * hop, dtype=torch.float64)
    analysis[:hop, 0] = transform / spread[:, None]
    _set(encoder.block[0].conv1, analysis)
    _set(encoder.conv2, _centre(torch.eye(2 * hop, dtype=torch.float64), 3))
    encoder.conv2.bias[hop:] = NO_SPREAD
    _set(decoder.conv1, _centre(unit, 7))
    synthesis = torch.zeros(hop, hop, 2 * hop, dtype=torch.float64)
    synthesis[:, 0] = transform * spread[:, None]
    _set(decoder.block[0].conv_t1, synthesis)
    _set(decoder.conv2, _centre(last, 7))
    return vae.eval().requires_grad_(False)


def _centre(matrix: Tensor, width: int) -> Tensor:
    weight = torch.zeros(*matrix.shape, width, dtype=torch.float64)
    weight[..., width // 2] = matrix
    return weight


def _set(conv: Any, weight: Tensor) -> None:
    """Of a weight-normed convolution, whose rows of zeros keep any direction at length 0."""
    length = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
    conv.weight_g.copy_(length)
    conv.weight_v.copy_(torch.where(length > 0, weight, conv.weight_v.double()))
