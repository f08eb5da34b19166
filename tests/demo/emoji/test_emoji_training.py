"""A phase goes on from its last checkpoint as if it had never stopped; losses by value."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from stepdistill.demo.emoji import training
from stepdistill.demo.emoji.captions import Entry
from stepdistill.demo.emoji.model import MAX_TOKENS, build_pipeline
from stepdistill.demo.emoji.training import Phase, reconstruction_loss


def phase(pictures: int = 24) -> Phase:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 3)

    def loss(generator: torch.Generator, final: bool) -> torch.Tensor:
        return (net(torch.randn(4, 3, generator=generator)) - 1).square().mean()

    snapshot = lambda: np.zeros((2, 2, 3), np.uint8)  # noqa: E731
    return Phase("toy", net, loss, snapshot, pictures, 4, 1e-2, 0.9)


def test_a_stopped_phase_goes_on_as_if_it_had_not(tmp_path, monkeypatch) -> None:
    whole, stopped = phase(), phase()
    assert whole.run(tmp_path / "whole", 0, math.inf)
    count, forever = 0, stopped.loss

    def third_fails(generator: torch.Generator, final: bool) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return forever(generator, final)

    monkeypatch.setattr(training, "CHECKPOINT_S", -1)
    stopped.loss = third_fails
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped", 0, math.inf)
    resumed = phase()
    assert resumed.run(tmp_path / "stopped", 0, math.inf)
    assert torch.equal(resumed.networks.weight, whole.networks.weight)
    assert not torch.equal(resumed.networks.weight, phase().networks.weight)
    assert len([*(tmp_path / "stopped" / "toy").glob("checkpoint-*")]) == 1


def test_a_phase_whose_time_is_up_is_saved_and_not_done(tmp_path) -> None:
    assert not phase().run(tmp_path, 0, time.monotonic() + 1e-9)
    assert not phase().run(tmp_path, 0, 0.0)
    assert phase().run(tmp_path, 0, math.inf)


def test_the_loss_is_told_of_the_final_part(tmp_path) -> None:
    made = phase(pictures=40)
    loss, parts = made.loss, []
    made.loss = lambda generator, final: (parts.append(final), loss(generator, final))[1]
    assert made.run(tmp_path, 0, math.inf)
    assert parts == 9 * [False] + [True]  # the first of the last two still at the full rate


def test_a_phase_that_is_done_is_only_read(tmp_path) -> None:
    first, again = phase(), phase()
    first.run(tmp_path, 0, math.inf)
    again.loss = None
    assert again.run(tmp_path, 0, math.inf)
    assert torch.equal(again.networks.weight, first.networks.weight)


def test_reconstruction_loss_sees_flat_error_at_every_scale_and_edges_twice() -> None:
    real = torch.zeros(1, 3, 64, 64)
    assert float(reconstruction_loss(real + 0.5, real)) == pytest.approx(4 * 0.5)
    red = torch.tensor([0.3, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    expected = 0.1 + 3 * (0.1 + 0.4 / 3)  # less its mean: 0.2, -0.1, -0.1
    assert float(reconstruction_loss(real + red, real)) == pytest.approx(expected)
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5  # +-0.5: no mean
    assert float(reconstruction_loss(real + checks, real)) == pytest.approx(0.5 + 2 * 1.0)


def test_the_pipeline_is_stock_small_and_reads_its_words() -> None:
    entries = [Entry("x", "woman firefighter", "people and body", "person role", "dark", "noto")]
    pipeline = build_pipeline(entries)
    parts = {"vae": 1.6e6, "unet": 4.0e6, "text_encoder": 0.7e6}
    for name, most in parts.items():
        assert sum(p.numel() for p in getattr(pipeline, name).parameters()) < most
    tokens = pipeline.tokenizer.tokenize("woman firefighter with dark skin in noto style")
    assert tokens[:2] == ["woman</w>", "firefighter</w>"]
    assert pipeline.tokenizer.model_max_length == MAX_TOKENS
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0
    with torch.no_grad():
        image = pipeline("woman", num_inference_steps=1, guidance_scale=1, output_type="np").images[
            0
        ]
    assert image.shape == (64, 64, 3)
