"""Families against the stock pipelines, and what each does alone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DDPMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from support.runs import NETWORKS
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import Cond
from stepdistill.families.dit import DiTFamily
from stepdistill.families.flux import FluxFamily
from stepdistill.families.lumina2 import Lumina2Family
from stepdistill.families.pixart import PixArtFamily
from stepdistill.families.sana import SanaFamily
from stepdistill.families.schedule import dynamic_shift, read_schedule
from stepdistill.families.sd import StableDiffusionFamily
from stepdistill.families.sd3 import StableDiffusion3Family
from stepdistill.families.sdxl import StableDiffusionXLFamily
from stepdistill.families.unet_guidance import guidance_embedding
from stepdistill.families.z_image import ZImageFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing import parity as check
from stepdistill.testing.parity import LIMIT, check_family, print_check
from stepdistill.testing.tiny import TINY, tiny_dit, tiny_sd, tiny_sd3, tiny_sdxl

# As the stock call at latent size 128; the VAE's attention is quadratic in 128 x 128.
LARGE_PIXART = {
    "transformer": {"sample_size": 128, "patch_size": 16, "use_additional_conditions": True},
    "vae": {"attention": False},
}


def tiny_lcm() -> LatentConsistencyModelPipeline:
    """tiny_sd with a random guidance projection, as the LCM pipeline class."""
    pipeline = tiny_sd()
    unet = StableDiffusionFamily(pipeline).copy_net(("w",))
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
    parts |= {"unet": unet, "scheduler": LCMScheduler.from_config(pipeline.scheduler.config)}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def without_zero_null(pipeline):
    """The SDXL pipeline with an encoded empty prompt as its null condition."""
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    return pipeline


# ------------------------------------------------------------------- parity with the stock pipeline
@pytest.mark.sampled(
    "dit",
    "edm",
    "flux",
    "flux_fill",
    "flux_kontext",
    "instruct_pix2pix",
    "lumina2",
    "pixart",
    "qwen_image",
    "qwen_image_edit",
    "sd3",
    "sd_inpaint",
    "sd_upscale",
    "sd_v",
    "sdxl",
    "sdxl_inpaint",
    "unet2d",
    "wan",
    "z_image",
)
def test_parity_with_the_stock_pipeline(family) -> None:
    rows = check_family(family)
    assert len(rows) == (10 if False in family.reads.values() else 6)
    assert {name: value for name, value in rows if not value < LIMIT} == {}


@pytest.mark.full
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_sd3(with_t5=True),
        TINY["sd35"],
        lambda: tiny_sd3(with_t5=True, version="3.5"),
        tiny_lcm,
        TINY["flux_schnell"],
        TINY["pixart_sigma"],
        lambda: TINY["pixart"](**LARGE_PIXART),
        lambda: without_zero_null(tiny_sdxl()),
    ],
    ids=[
        "sd3_t5",
        "sd35",
        "sd35_t5",
        "lcm",
        "flux_schnell",
        "pixart_sigma",
        "pixart_alpha_1024",
        "sdxl_empty_prompt_null",
    ],
)
def test_parity_of_variants(build) -> None:
    rows = check_family(build())
    assert {name: value for name, value in rows if not value < LIMIT} == {}


@pytest.mark.full
def test_parity_does_not_depend_on_the_checkpoints_scheduler() -> None:
    pipeline = tiny_sd()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    before = pipeline.scheduler
    assert max(value for _, value in check_family(pipeline)) < LIMIT
    assert pipeline.scheduler is before


@pytest.mark.sampled(family=NETWORKS)
def test_a_call_never_waits_for_the_device(family) -> None:
    """On the meta device, where numbers can't be read back; lengths that shape a call are kept on
    the CPU. Lumina 2's own network reads its mask at every call."""
    by_text = family.conditioning == "prompt"
    prompts: list[Any] = ["a cube", "seven cats in a row"] if by_text else [0, 1]
    cond = family.encode(prompts)
    shape = (2, *family.sample_shape())
    if family.needs_images():
        given = {
            name: torch.zeros(2, 1 if name == "mask" else 3, 16, 16)
            for name in family.needs_images()
        }
        cond = family.with_images(family.encode_text(prompts), given, shape[1:])
    for part in family.side_parts.values():
        part.to("meta")
    cond, x_t = cond.to("meta"), torch.empty(shape, device="meta")
    model_t = torch.empty(2, dtype=torch.float64, device="meta")
    net = family.net.to("meta")
    on_host = family.name == "lumina2" or len(family.net_parts) > 1  # which expert: by the times
    reads = pytest.raises(NotImplementedError) if on_host else nullcontext()
    with reads:
        assert family.forward(net, x_t, model_t, cond).shape == shape


class WrongNull(StableDiffusionFamily):
    def null(self, bsz: int):
        return self.encode(["something"]).repeat(bsz)


class WrongTime(StableDiffusion3Family):
    def forward(self, net, x_t, model_t, cond, w=None) -> Tensor:
        return super().forward(net, x_t, model_t / 1000, cond, w)


class WrongScale(StableDiffusion3Family):
    def latents(self, images, generator=None) -> Tensor:
        return super().latents(images, generator) + 0.0609


class WrongLabel(DiTFamily):
    def encode(self, prompts):
        return super().encode([p + 1 for p in prompts])


class WrongPacking(FluxFamily):
    def pack(self, latents: Tensor) -> Tensor:
        return super().pack(latents.transpose(-1, -2))


class WrongGuidance(FluxFamily):
    def forward(self, net, x_t, model_t, cond, w=None) -> Tensor:
        return super().forward(net, x_t, model_t, cond, None if w is None else w + 1)


class WrongMask(PixArtFamily):
    def encode(self, prompts):
        cond = super().encode(prompts)
        return Cond({**cond.tensors, "mask": torch.ones_like(cond["mask"])})


class WrongSize(StableDiffusionXLFamily):
    def added_conditions(self, x_t, cond, dtype):
        added = super().added_conditions(x_t, cond, dtype)
        return {**added, "time_ids": added["time_ids"] * 2}


class WrongSanaNull(SanaFamily):
    def null(self, bsz: int) -> Cond:
        return self.encode([""]).repeat(bsz)


class WrongSign(Lumina2Family):
    def forward(self, net, x_t, model_t, cond, w=None) -> Tensor:
        return -super().forward(net, x_t, model_t, cond, w)


class WrongLength(ZImageFamily):
    def encode(self, prompts):
        cond = super().encode(prompts)
        return Cond({**cond.tensors, "length": cond["length"] + 1})


class WrongConvention(ZImageFamily):
    def stock_guidance(self, guidance: float) -> float:
        return guidance


@pytest.mark.sampled(
    "WrongLength-build0-encode",
    "WrongPacking-build3-denoiser",
    "WrongGuidance-build4-encode",
    "WrongMask-build5-encode",
    "WrongNull-tiny_sd-sampling",
    "WrongTime-tiny_sd3-denoiser",
    "WrongScale-tiny_sd3-vae: encode",
    "WrongLabel-tiny_dit-encode",
)
@pytest.mark.parametrize(
    ("wrong", "build", "row"),
    [
        (WrongLength, TINY["z_image"], "encode"),
        (WrongConvention, TINY["z_image"], "denoiser"),
        (WrongSign, TINY["lumina2"], "denoiser"),
        (WrongPacking, TINY["flux"], "denoiser"),
        (WrongGuidance, TINY["flux"], "encode"),
        (WrongMask, TINY["pixart"], "encode"),
        (WrongSize, tiny_sdxl, "encode"),
        (WrongSanaNull, TINY["sana"], "sampling"),
        (WrongNull, tiny_sd, "sampling"),
        (WrongTime, tiny_sd3, "denoiser"),
        (WrongScale, tiny_sd3, "vae: encode"),
        (WrongLabel, tiny_dit, "encode"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, build, row) -> None:
    found = [name for name, value in check_family(wrong(build())) if not value < LIMIT]
    assert any(name.startswith(row) for name in found)


@pytest.mark.full
def test_print_check_exit_code(tmp_path, capsys) -> None:
    tiny_dit().save_pretrained(tmp_path)
    assert print_check(str(tmp_path)) == 0
    assert "sampling" in capsys.readouterr().out
    assert print_check(WrongTime(tiny_sd3())) == 1


@pytest.mark.full
def test_check_leaves_the_pipeline_as_it_was() -> None:
    pipeline = tiny_sd()
    pipeline.set_progress_bar_config(desc="mine")
    hooks = len(pipeline.unet._forward_hooks)
    check.check_family(pipeline)
    assert pipeline._progress_bar_config == {"desc": "mine"}
    assert len(pipeline.unet._forward_hooks) == hooks


# ---------------------------------------------------------------------------------------- encoding
def test_null_is_the_empty_prompt(make_family) -> None:
    family = make_family("sd")
    embeds, negative = family.pipeline.encode_prompt("x", "cpu", 1, True)
    assert torch.equal(family.null(2)["prompt_embeds"], negative.expand(2, -1, -1))
    assert not torch.equal(embeds, negative)


def test_encode_refuses_what_is_no_list_of_strings(make_family) -> None:
    for wrong in (["ok", 3], "a single string"):
        with pytest.raises(TypeError, match="expected a list of strings"):
            make_family("sd3").encode(wrong)


@pytest.mark.sampled(family=NETWORKS)
def test_encoding_carries_no_graph(family) -> None:
    cond = family.encode([1] if family.conditioning == "label" else ["a cat"])
    assert not any(value.requires_grad for value in cond.tensors.values())


def test_dit_labels_by_name_and_id(make_family) -> None:
    family = make_family("dit")
    assert family.encode(["goldfish", 5])["class_labels"].tolist() == [1, 5]
    assert family.null(2)["class_labels"].tolist() == [1000, 1000]
    for wrong in (1000, -1, 0.5, "no such thing"):
        with pytest.raises(ValueError, match=r"label|exist"):
            family.encode([wrong])


def test_dit_label_names_survive_saving(make_family, tmp_path) -> None:
    family = make_family("dit")
    family.pipeline.save_pretrained(tmp_path)
    assert DiTPipeline.from_pretrained(tmp_path).labels == family.pipeline.labels


# -------------------------------------------------------------------------------------- the network
def test_learned_sigma_channels_are_dropped(make_family) -> None:
    family = make_family("dit")
    x, cond = torch.randn(2, 4, 8, 8), family.encode([0, 1])
    both = family.net(x, timestep=torch.tensor([7, 7]), class_labels=cond["class_labels"]).sample
    assert both.shape[1] == 8
    assert torch.equal(family.forward(family.net, x, torch.tensor([7.0, 7.0]), cond), both[:, :4])


@pytest.mark.sampled(family=NETWORKS)
def test_networks_run_in_their_own_dtype(family) -> None:
    family.net.to(torch.bfloat16)
    cond = family.encode([1] if family.conditioning == "label" else ["a cat"])
    x = torch.randn(1, *family.sample_shape())
    out = family.forward(family.net, x, torch.tensor([999.0]), cond)
    # EDM's skip connection is float32: x_t is of size sigma_max, D of size 1.
    assert out.dtype == (torch.float32 if family.name == "edm" else torch.bfloat16)
    assert next(family.net.parameters()).dtype == torch.bfloat16


def test_guidance_input_starts_without_effect(make_family) -> None:
    family = make_family("sd")
    net = family.copy_net(("w",))
    assert net.config.time_cond_proj_dim == 256
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 19.0]), family.encode(["a", "b"])
    plain = family.forward(family.net, x, t, cond)
    assert torch.equal(family.forward(net, x, t, cond, w=torch.tensor([0.0, 9.0])), plain)
    torch.nn.init.normal_(net.time_embedding.cond_proj.weight)
    assert (family.forward(net, x, t, cond, w=torch.tensor([0.0, 9.0])) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [256, 17])
def test_guidance_embedding_is_the_stock_pipelines(dim) -> None:
    w = torch.tensor([0.0, 2.5, 13.0])
    stock = tiny_sd().get_guidance_scale_embedding(w, embedding_dim=dim)
    assert torch.equal(guidance_embedding(w, dim), stock)


@pytest.mark.parametrize("name", ["sd", "sd3", "dit"])
def test_w_without_its_input_is_refused(name, make_family) -> None:
    family = make_family(name)
    cond = family.null(1)
    with pytest.raises(ValueError, match="expected"):
        family.forward(family.net, torch.randn(1, 4, 8, 8), torch.ones(1), cond, w=torch.ones(1))


def test_extra_inputs_the_stock_class_lacks_are_refused(make_family) -> None:
    with pytest.raises(ValueError, match="embed_guidance"):
        make_family("sd3").copy_net(("w",))


@pytest.mark.sampled(family=NETWORKS)
def test_parts_besides_the_denoiser_are_frozen_and_in_eval_mode(family) -> None:
    for name, part in family.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            if name not in family.net_parts:
                assert not any(p.requires_grad for p in part.parameters())


# ------------------------------------------------------------------------------------ images, sizes
@pytest.mark.sampled(family=NETWORKS)
def test_latents_sample_with_a_generator_and_take_the_mode_without(family) -> None:
    blank = family.images(torch.zeros(2, *family.sample_shape()))
    images = torch.rand(blank.shape) * 2 - 1
    mode = family.latents(images)
    one, two = (family.latents(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(mode, family.latents(images))
    assert torch.equal(one, two)
    parts = family.pipeline.components
    deterministic = isinstance(parts.get("vae"), AutoencoderDC | None)
    assert torch.equal(one, mode) == deterministic
    assert mode.shape == (2, *family.sample_shape())


@pytest.mark.sampled(family=NETWORKS)
def test_images_pass_gradients_to_latents(family) -> None:
    latents = torch.randn(1, *family.sample_shape(), requires_grad=True)
    family.images(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_grey_vae_reads_three_colours() -> None:
    from stepdistill.testing.identity_vae import identity_vae

    pipeline = tiny_dit()
    pipeline.register_modules(vae=identity_vae(8))
    family = DiTFamily(pipeline)
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    assert torch.allclose(family.images(family.latents(images)), images, atol=1e-5)
    assert family.latents(images).shape == (2, 1, 8, 8)


def test_images_of_another_shape_are_refused(make_family) -> None:
    with pytest.raises(ValueError, match="expected images"):
        make_family("sd").latents(torch.zeros(3, 16, 16))


def test_sample_shape_follows_the_pixels(make_family) -> None:
    assert make_family("sd").sample_shape(32, 16) == (4, 16, 8)
    assert make_family("sd3").sample_shape(16, 24) == (4, 8, 12)
    with pytest.raises(ValueError, match="multiple of 2 px"):
        make_family("sd").sample_shape(31, 16)
    with pytest.raises(ValueError, match="multiple of 4 px"):
        make_family("sd3").sample_shape(18, 16)
    with pytest.raises(ValueError, match="expected 16 px"):
        make_family("dit").sample_shape(32, 32)


def test_lumina2_features_are_image_tokens_whatever_the_prompts_beside(make_family) -> None:
    """A row's features do not depend on the length of another row's prompt."""
    family = make_family("lumina2")
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.7]).double()
    short, long = family.encode(["a"]), family.encode(["a long prompt of many letters"])
    with torch.no_grad():
        both = teacher(x, t, Cond.cat([short, long]), features=("mid",)).features["mid"]
        alone = teacher(x[:1], t[:1], short, features=("mid",)).features["mid"]
    assert both.shape == (2, 16, 16)
    assert torch.allclose(both[:1], alone, atol=1e-5)


# ------------------------------------------------------------------------------- guidance by input
def test_guidance_goes_to_a_network_that_embeds_it(make_family) -> None:
    """No null pass: the guided teacher is one call told g, for numbers and tensors alike."""
    family = make_family("flux")
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.5]), family.encode(["a", "b"])
    with torch.no_grad():
        told = teacher(x, t, cond, guidance=3.5).raw
        rows = teacher(x, t, cond, guidance=torch.tensor([3.5, 3.5])).raw
        by_hand = family.forward(family.net, x, 1000 * t, cond, w=torch.full((2,), 2.5))
        unguided = teacher(x, t, cond).raw
        told_one = family.forward(family.net, x, 1000 * t, cond, w=torch.zeros(2))
    assert torch.equal(told, by_hand)
    assert torch.equal(rows, by_hand)
    assert torch.equal(unguided, told_one)
    assert (told - unguided).abs().max() > 1e-4


def test_flux_without_the_embedding_is_guided_by_a_null_pass(make_family) -> None:
    family = make_family("flux_schnell")
    assert not family.embeds_guidance
    with pytest.raises(ValueError, match="no guidance embedding"):
        family.forward(
            family.net, torch.randn(1, 4, 8, 8), torch.ones(1), family.null(1), w=torch.ones(1)
        )
    with pytest.raises(ValueError, match="embed_guidance"):
        family.copy_net(("w",))


def test_lora_reaches_the_second_attention_of_sd35(make_family) -> None:
    """Its targets name modules by their endings: attn2, which SD3 lacks, is one of them."""
    family = make_family("sd35")
    bank = RoleBank(family, {"student": Role(train=True)}, Tuning(rank=2))
    adapted = {name.split(".lora_")[0] for name in bank.members("student")}
    assert "transformer_blocks.0.attn2.to_q" in adapted
    assert not any("norm" in name for name in adapted)


def test_sdxl_null_is_zeros_where_the_pipeline_says_so(make_family) -> None:
    null = make_family("sdxl").null(2)
    assert {name: float(v.abs().sum()) for name, v in null.tensors.items()} == {
        "prompt_embeds": 0.0,
        "pooled": 0.0,
    }


def test_packing_is_undone_by_unpacking(make_family) -> None:
    family = make_family("flux")
    x = torch.randn(2, 4, 8, 12)
    assert family.pack(x).shape == (2, 24, 16)
    assert torch.equal(family.unpack(family.pack(x), (4, 8, 12)), x)


# ---------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_stock_schedulers(kind) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    for tokens in (256, 1000, 4096):
        config = scheduler.config
        mu = calculate_shift(tokens, 256, 4096, config.base_shift, config.max_shift)
        scheduler.set_timesteps(sigmas=[0.5], mu=mu)
        shift = dynamic_shift(config, tokens)
        assert float(scheduler.sigmas[0]) == pytest.approx(shift / (shift + 1), abs=1e-6)


def test_flux_shift_follows_the_image_size() -> None:
    assert FluxFamily(TINY["flux"]()).shift == pytest.approx(math.exp(1.15))
    pipeline = TINY["flux"]()
    pipeline.scheduler.register_to_config(max_image_seq_len=28)  # 16 tokens lie half way from 4
    assert FluxFamily(pipeline).shift == pytest.approx(math.exp((0.5 + 1.15) / 2))


def test_schedules_are_read_from_the_scheduler(make_family) -> None:
    kinds = {n: (make_family(n).kind, make_family(n).shift) for n in ("sd", "sd_v", "sd3", "dit")}
    assert kinds == {
        "sd": ("eps", 1.0),
        "sd_v": ("v", 1.0),
        "sd3": ("flow", 3.0),
        "dit": ("eps", 1),
    }


def test_flow_sigmas_of_a_multistep_scheduler_are_a_flow_path() -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    _, kind, shift = read_schedule(scheduler)
    assert (kind, shift) == ("flow", 5.0)


def test_eps_with_zero_terminal_snr_is_refused() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        read_schedule(scheduler)
