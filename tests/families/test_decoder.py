"""The small decoder of losses: which files it takes, and that the bank decodes with it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny

from stepdistill.config.tuning import Tuning
from stepdistill.families.decoder import decoder_config, load_decoder
from stepdistill.roles.rolebank import RoleBank


def tiny_decoder(channels: int = 4) -> AutoencoderTiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=channels,
        )


def test_loaded_it_is_the_saved_one_and_frozen(tmp_path) -> None:
    saved = tiny_decoder()
    saved.save_pretrained(tmp_path)
    loaded = load_decoder(str(tmp_path), 4)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_another_latent_space_is_refused(tmp_path) -> None:
    tiny_decoder(16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"latents of 4 channels, got .* for 16"):
        load_decoder(str(tmp_path), 4)


def test_another_class_and_an_empty_folder_are_refused(make_family, tmp_path) -> None:
    make_family("sd").pipeline.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="expected an AutoencoderTiny, got a AutoencoderKL"):
        decoder_config(str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="decoder: expected a folder or Hub id"):
        decoder_config(str(tmp_path / "nowhere"))


def test_the_bank_decodes_scaled_latents_with_it(make_family) -> None:
    family, decoder = make_family("sd"), tiny_decoder()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = RoleBank(family, {}, Tuning(), decoder=decoder).images(latents)
        assert torch.equal(images, decoder.decode(latents).sample)
    assert images.shape == (2, 3, 16, 16)


def test_without_one_the_bank_decodes_with_the_vae(make_family) -> None:
    family = make_family("sd")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(RoleBank(family, {}, Tuning()).images(latents), family.images(latents))


def test_decoding_ignores_autocast(make_family) -> None:
    bank = RoleBank(make_family("sd"), {}, Tuning(), decoder=tiny_decoder())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = bank.images(latents)
    with torch.no_grad():
        assert torch.equal(inside, bank.images(latents))
