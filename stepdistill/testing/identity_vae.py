"""An AutoencoderKL set by hand so that decode(encode(x)) = x, with no training.

With it the stock latent pipeline works directly on pixels, standardised to mean 0 and spread 1.

Idea: one block has no down- or upsampling, and its residual branches vanish when their last
convolution is zero. What remains is conv_in -> GroupNorm -> SiLU -> conv_out. Carry four channels
[z, -z, M, -M] with a large constant M: their mean is 0 and their variance is M^2/2 to a relative
z^2/M^2, so the norm only divides by the constant s = M/sqrt(2). SiLU is undone exactly by
silu(a) - silu(-a) = a, taken with weights s, -s in conv_out.
"""

# B batch, H height, W width

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

CARRIER = 3000.0  # M: makes the error of the norm ~1e-7 z^2; float32 rounding is then as small
LOG_VARIANCE = -30.0  # the posterior's spread is exp(-15): sampling it adds nothing visible


@torch.no_grad()
def identity_vae(
    sample_size_px: int, mean: float = 0.0, std: float = 1.0, channels: int = 1
) -> AutoencoderKL:
    """An AutoencoderKL whose latent is (x - mean) / std at full resolution.

    Args:   sample_size_px: image height = width; mean, std: of the images' pixels in [-1, 1];
            channels: of images and latents.
    Notes:  decode(encode(x)) returns x to about 1e-6 in float32.
    """
    if std <= 0:
        raise ValueError(f"std: expected a positive spread, got {std}. Use the pixels' own spread.")
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4 * channels,),
        layers_per_block=1,
        norm_num_groups=channels,  # each normed by itself
        sample_size=sample_size_px,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    for parameter in vae.parameters():
        parameter.zero_()  # every residual branch ends in a zero convolution: identity
    for part in (vae.encoder, vae.decoder):
        part.conv_norm_out.weight.fill_(1.0)
    for i in range(channels):
        _centre_tap(vae.quant_conv, i, i, 1.0)
        _centre_tap(vae.quant_conv, channels + i, channels + i, 1.0)
        _centre_tap(vae.post_quant_conv, i, i, 1.0)
        _linear_path(vae.encoder, i, 1 / std, -mean / std, scale_out=1.0, shift_out=0.0)
        _linear_path(vae.decoder, i, 1.0, 0.0, scale_out=std, shift_out=mean)
    vae.encoder.conv_out.bias[channels:] = LOG_VARIANCE
    return vae.eval().requires_grad_(False)


def _linear_path(
    part: Encoder | Decoder,
    index: int,
    scale_in: float,
    shift_in: float,
    scale_out: float,
    shift_out: float,
) -> None:
    """Makes that output channel scale_out * (scale_in * input + shift_in) + shift_out."""
    norm_scale = CARRIER / math.sqrt(2)
    for channel, sign in ((4 * index, 1.0), (4 * index + 1, -1.0)):
        _centre_tap(part.conv_in, channel, index, sign * scale_in)
        part.conv_in.bias[channel] = sign * shift_in
        part.conv_in.bias[channel + 2] = sign * CARRIER
        _centre_tap(part.conv_out, index, channel, sign * scale_out * norm_scale)
    part.conv_out.bias[index] = shift_out


def _centre_tap(conv: nn.Conv2d, out_channel: int, in_channel: int, value: float) -> None:
    centre = conv.kernel_size[0] // 2
    conv.weight[out_channel, in_channel, centre, centre] = value
