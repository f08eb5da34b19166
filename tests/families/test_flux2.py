"""What Flux.2 does that no other family does: batch-normed patches, a shift by steps, no null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import save_file
from support.runs import build_trainer, teacher_dir

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.times import uniform_grid
from stepdistill.families.flux2 import DEFAULT_STEPS, Flux2Family
from stepdistill.families.flux2_dev import Flux2DevFamily
from stepdistill.families.flux_guidance import fix_guidance
from stepdistill.families.registry import teacher_facts
from stepdistill.loading.safe_files import check_safetensors
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny_flux2 import flux2_transformer, tiny_flux2, tiny_flux2_dev


@pytest.mark.full
def test_parity_of_a_step_distilled_pipeline() -> None:
    rows = check_family(tiny_flux2(is_distilled=True))
    assert {name: value for name, value in rows if not value < LIMIT} == {}


class WrongOrder(Flux2Family):
    def pack(self, latents):
        return super().pack(latents.transpose(-1, -2))


class GuidedAnyway(Flux2Family):
    def __init__(self, pipeline) -> None:
        super().__init__(pipeline)
        self.has_null = True


class Unnormed(Flux2Family):
    def latents(self, images, generator=None):
        return super().latents(images, generator) + 0.1


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "is_distilled", "row"),
    [
        (WrongOrder, False, "denoiser"),
        (GuidedAnyway, True, "sampling"),
        (Unnormed, False, "vae: encode"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, is_distilled, row) -> None:
    rows = check_family(wrong(tiny_flux2(is_distilled=is_distilled)))
    found = [name for name, value in rows if not value < LIMIT]
    assert any(name.startswith(row) for name in found)


def test_latents_are_the_stock_pipelines() -> None:
    family = Flux2Family(tiny_flux2())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        stock = family.pipeline._encode_vae_image(images, None)
    assert stock.shape == (2, 16, 4, 4)
    assert torch.allclose(family.latents(images), stock, atol=1e-5)


def test_shift_is_that_of_the_stock_calls_default_step_count() -> None:
    family = Flux2Family(tiny_flux2())
    scheduler = family.pipeline.scheduler
    uniform = np.linspace(1.0, 1.0 / DEFAULT_STEPS, DEFAULT_STEPS)
    scheduler.set_timesteps(sigmas=uniform, mu=compute_empirical_mu(16, DEFAULT_STEPS))
    grid = uniform_grid(DEFAULT_STEPS, family.shift)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(list(grid), abs=1e-6)


def test_features_of_single_blocks_are_image_tokens() -> None:
    family = Flux2Family(tiny_flux2())
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([0.7, 0.7]).double()
    with torch.no_grad():
        made = teacher(x, t, family.encode(["a", "b"]), features=("block.0", "block.3"))
        out = family.net.proj_out(
            family.net.norm_out(made.features["block.3"], _embedding(family, t))
        )
    assert made.features["block.0"].shape == (2, 16, 16)
    assert torch.allclose(family.unpack(out, (16, 4, 4)), made.raw, atol=1e-5)


def _embedding(family, t):
    return family.net.time_guidance_embed(t.float() * 1000, None)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_only_a_step_distilled_pipeline_has_no_null(is_distilled, tmp_path) -> None:
    pipeline = tiny_flux2(is_distilled=is_distilled)
    pipeline.save_config(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    assert Flux2Family(pipeline).has_null is not is_distilled
    assert teacher_facts(tmp_path).has_null is not is_distilled


def test_the_counter_of_a_batch_norm_alone_may_be_an_integer(tmp_path) -> None:
    counted = {"bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    save_file(counted, tmp_path / "counted.safetensors")
    check_safetensors(tmp_path / "counted.safetensors", floating=True)
    save_file({**counted, "conv.weight": torch.ones(2).long()}, tmp_path / "integers.safetensors")
    with pytest.raises(ValueError, match=r"floating-point weights, got \['I64'\]"):
        check_safetensors(tmp_path / "integers.safetensors", floating=True)


@pytest.mark.full
def test_the_card_gives_the_prompt_by_name(tmp_path, tmp_path_factory) -> None:
    """The first argument of the stock call is an image."""
    teacher = teacher_dir("flux2", tmp_path_factory)
    out = build_trainer("dmd2", teacher, "lora", tmp_path / "run").export(tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "pipe(prompt='a prompt', num_inference_steps=2)" in card


def test_adapters_reach_the_single_blocks() -> None:
    family = Flux2Family(tiny_flux2())
    bank = RoleBank(family, {"student": Role(train=True)}, Tuning(rank=2))
    adapted = {name.split(".lora_")[0] for name in bank.members("student")}
    assert {
        "transformer_blocks.0.attn.to_out.0",
        "single_transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    } <= adapted


# ------------------------------------------------------------------------------------------- dev
class Untold(Flux2DevFamily):
    def embedded_guidance(self, model_t, w):
        return super().embedded_guidance(model_t, None)


@pytest.mark.full
def test_check_finds_a_dev_adapter_that_forgets_the_guidance() -> None:
    rows = check_family(Untold(tiny_flux2_dev()))
    wrong, told = (
        [name for name, value in rows if not value < LIMIT],
        "sampling: 4 steps, guidance 3",
    )
    assert wrong == [told, f"with a reference, {told}"]


def test_dev_prompts_reach_the_network() -> None:
    embeds = Flux2DevFamily(tiny_flux2_dev()).encode(["a red cube", "cats"])["prompt_embeds"]
    assert embeds.shape == (2, 512, 48)
    assert (embeds[0] - embeds[1]).abs().max() > 0.1


def test_dev_without_its_embedding_is_refused() -> None:
    pipeline = tiny_flux2_dev()
    pipeline.register_modules(transformer=flux2_transformer())
    with pytest.raises(ValueError, match="expected a transformer that is told the guidance"):
        Flux2DevFamily(pipeline)


@pytest.mark.full
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_fixed_guidance_heeds_no_other(guidance) -> None:
    family = Flux2DevFamily(tiny_flux2_dev())
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 16, 4, 4, generator=generator), torch.tensor([1000.0, 500.0])
    cond, net = family.encode(["a", "b"]), fix_guidance(family.net, guidance)

    def answer(of, told):
        with torch.no_grad():
            return family.forward(of, x, t, cond, w=torch.full((2,), told - 1.0))

    wanted = answer(family.net, guidance)
    apart = [float((answer(net, told) - wanted).abs().max()) for told in (0.0, 1.0, 4.0, 20.0)]
    assert max(apart) < 1e-4
    assert float((answer(family.net, 9.0) - wanted).abs().max()) > 1e-2


def test_a_narrow_guidance_sinusoid_cannot_be_fixed() -> None:
    assert fix_guidance(flux2_transformer(guidance_embeds=True), 1.0) is None
