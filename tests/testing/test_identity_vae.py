"""The analytic VAE is the identity, from the encoder's mode and from its samples."""

import pytest
import torch
from diffusers import AutoencoderKL

from stepdistill.testing.identity_vae import identity_vae


def random_images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 0.75)])
def test_decode_of_encode_is_the_image(mean: float, std: float) -> None:
    vae, images = identity_vae(8, mean, std), random_images(0)
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    assert (decoded - images).abs().max() < 1e-5


def test_sampled_latents_decode_to_the_image() -> None:
    vae, images = identity_vae(8, -0.4, 0.75), random_images(1)
    decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample
    assert (decoded - images).abs().max() < 1e-5


def test_latent_is_the_standardised_image() -> None:
    vae, images = identity_vae(8, -0.4, 0.75), random_images(2)
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(latents, (images + 0.4) / 0.75, atol=1e-5)


def test_colours_do_not_mix() -> None:
    vae, images = identity_vae(8, 0.1, 0.5, channels=3), random_images(5)[:63].view(21, 3, 8, 8)
    latents = vae.encode(images).latent_dist.mode()
    assert torch.allclose(latents, (images - 0.1) / 0.5, atol=1e-5)
    assert torch.allclose(vae.decode(latents).sample, images, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_decoder_is_affine_in_latents_of_any_size(scale: float) -> None:
    vae = identity_vae(8, -0.4, 0.75)
    latents = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * scale
    error = vae.decode(latents).sample - (0.75 * latents - 0.4)
    assert error.abs().max() < 1e-4 * max(1.0, scale)


def test_reloads_from_disk_unchanged(tmp_path) -> None:
    vae, images = identity_vae(8, -0.4, 0.75), random_images(4)
    vae.save_pretrained(tmp_path)
    reloaded = AutoencoderKL.from_pretrained(tmp_path)
    latents = vae.encode(images).latent_dist.mode()
    assert torch.equal(reloaded.decode(latents).sample, vae.decode(latents).sample)


def test_rejects_a_spread_of_zero() -> None:
    with pytest.raises(ValueError, match="std: expected a positive"):
        identity_vae(8, std=0.0)
