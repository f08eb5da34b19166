"""Where weights go before training: dtypes and devices of the pipeline's parts."""

from __future__ import annotations

import torch

from stepdistill import TrainConfig
from stepdistill.core.method import Role
from stepdistill.families.registry import FAMILIES
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny import TINY
from stepdistill.training.batches import BatchMaker
from stepdistill.training.step import place


def placed(device: str = "cpu", **options: object) -> RoleBank:
    args = TrainConfig(tuning={"rank": 2}, **options)
    family = FAMILIES["sd"](TINY["sd"]())
    bank = RoleBank(family, {"teacher": Role(), "student": Role(train=True)}, args.tuning)
    place(bank, args, torch.device(device))
    return bank


def test_text_encoders_follow_the_base_and_the_autoencoder_stays_whole() -> None:
    pipeline = placed(mixed_precision="bf16").family.pipeline
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.unet.time_embedding.linear_1.weight.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32


def test_trained_weights_stay_float32() -> None:
    bank = placed(mixed_precision="bf16")
    assert {p.dtype for p in bank.members("student").values()} == {torch.float32}


def test_offloaded_encoders_stay_on_the_cpu() -> None:
    pipeline = placed("meta", offload_encoders=True).family.pipeline
    assert pipeline.unet.device.type == "meta"
    assert pipeline.text_encoder.device.type == pipeline.vae.device.type == "cpu"


def test_offloaded_encoders_feed_a_run_on_another_device() -> None:
    bank = placed("meta", offload_encoders=True)
    family, calls = bank.family, []
    latents = family.latents
    family.latents = lambda images: calls.append(images.device.type) or latents(images)
    size = family.images(torch.zeros(1, *family.sample_shape())).shape[-1]
    maker = BatchMaker(family, torch.device("meta"))
    raw = {
        "index": [0, 1],
        "prompt": ["a", "b"],
        "image": torch.rand(2, 3, size, size) * 2 - 1,
    }
    for _ in range(2):
        batch = maker(raw)
        assert batch.x0 is not None
        assert batch.x0.device.type == batch.cond["prompt_embeds"].device.type == "meta"
    assert calls == ["cpu", "cpu"]  # one call an image; the second round reads what is cached
