"""Sounds made here, the autoencoder set by hand, and the teacher's training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import fingerprint

from stepdistill.demo.sound import teacher as training
from stepdistill.demo.sound.data import HOP, KINDS, LENGTH, START, caption, sound, sounds
from stepdistill.demo.sound.mdct_vae import mdct, mdct_vae, to_latents
from stepdistill.demo.sound.teacher import SoundTeacher, channel_spread, tokenizer, train
from stepdistill.families.stable_audio import StableAudioFamily
from stepdistill.testing.parity import LIMIT, check_family


def test_a_caption_says_what_is_heard() -> None:
    assert len({caption(k) for k in range(len(KINDS))}) == 36
    low, high = (KINDS.index(("flute", name, "slow")) for name in ("low", "high"))
    for kind, hertz in ((low, 170), (high, 700)):
        spectrum = np.abs(np.fft.rfft(sound(kind, 0, 0)))
        loudest = spectrum.argmax() / (HOP * LENGTH) * 4000
        assert 0.7 * hertz < loudest < 1.05 * hertz
    assert np.array_equal(sound(3, 0, 5), sound(3, 0, 5))
    assert not np.array_equal(sound(3, 0, 5), sound(3, 0, 6))


def test_the_transform_is_orthonormal_over_neighbours() -> None:
    rows = mdct(8)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), atol=1e-12, rtol=0)
    lapped = rows[:, 8:] @ rows[:, :8].T
    torch.testing.assert_close(lapped, torch.zeros(8, 8).double(), atol=1e-12, rtol=0)


def test_the_autoencoder_gives_back_what_it_is_given() -> None:
    spread = torch.linspace(0.5, 2.0, HOP).double()
    vae, waves = mdct_vae(spread), sounds([0, 35], 0)
    latents = vae.encode(waves).latent_dist.mode()
    torch.testing.assert_close(latents, to_latents(waves, spread), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents).sample, waves, atol=2e-6, rtol=0)
    assert float(waves[..., :START].abs().max()) == 0.0  # the edges are not reproduced


def test_words_are_tokens() -> None:
    assert len(tokenizer()(caption(7)).input_ids) == 7  # six words and the end


@pytest.mark.full
def test_training_goes_on_where_it_was_cut_off(tmp_path, monkeypatch) -> None:
    small = {"train_batch_size": 4, "num_layers": 1, "num_heads": 1, "text_width": 16}
    config = SoundTeacher(max_train_steps=4, **small)
    whole, took = train(config, tmp_path / "whole")
    assert took["steps"] == 4
    real, calls = training._loss, []

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut")
    monkeypatch.setattr(training, "_loss", real)
    again, _ = train(config, tmp_path / "cut")
    families = [
        StableAudioFamily(training.StableAudioPipeline.from_pretrained(f)) for f in (whole, again)
    ]
    first, second = (fingerprint(f.net.state_dict()) for f in families)
    assert first == second
    rows = check_family(families[0])
    assert {name: value for name, value in rows if not value < LIMIT} == {}
    with pytest.raises(ValueError, match="Name another folder"):
        train(SoundTeacher(max_train_steps=5, **small), tmp_path / "cut")


def test_silent_channels_are_not_blown_up() -> None:
    spread = channel_spread()
    assert float(spread.min()) >= 0.05 * float(spread.max())


@pytest.mark.full
def test_the_whole_of_it(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import sound as benchmark

    results = benchmark.main(
        [
            *("--output_dir", str(tmp_path), "--teacher_steps", "2", "--updates", "2"),
            *("--per_caption", "1", "--iterations", "2", "--inpainted", "1", "--judge_steps", "2"),
        ]
    )
    del sys.modules["sound"]
    assert {*results["measured"]} == {
        *("real", "teacher, 25 steps", "teacher, 4 steps", "teacher, 1 steps"),
        *("student, 4 steps", "student, 1 steps"),
    }
    assert "<audio" in (tmp_path / "report.html").read_text()
