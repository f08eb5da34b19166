"""What a single file holds is used, harmless by a stated rule, or refused; its marks are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.original import clip_state, denoiser_state, vae_state
from support.runs import teacher_dir
from torch import Tensor

from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource

MARK, NET = torch.zeros(0), "model.diffusion_model."
WEIGHT = f"{NET}input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model."


@pytest.fixture
def file(tmp_path, tmp_path_factory) -> Callable[..., ModelSource]:
    """A whole Stable Diffusion checkpoint, or the denoiser alone of others, with more beside it."""

    def write(family: str, more: dict[str, Any], metadata: dict[str, str]) -> ModelSource:
        folder = teacher_dir(family, tmp_path_factory)
        pipe = load_family(folder).pipeline
        net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        state: dict[str, Tensor] = denoiser_state(net, NET)
        if family.startswith("sd_") or family == "sd":
            state |= {**vae_state(pipe.vae), **clip_state(pipe.text_encoder)}
        path = tmp_path / "model.safetensors"
        save_file(state | more, path, metadata={"format": "pt", **metadata})
        return ModelSource(str(path), single_file_config=str(folder))

    return write


X = torch.ones(2)
LEFT_OVER: list[tuple[str, str]] = [
    ("sd_v", f"{NET}input_blocks.0.0.scale_weight"),
    ("sd_v", f"{NET}input_blocks.0.0.weight_scale"),
    ("sd_v", f"{NET}input_blocks.0.0.comfy_quant"),
    ("sd_v", "scaled_fp8"),
    ("sd_v", f"{NET}scaled_fp8"),
    ("sd_v", f"{NET}input_blocks.99.0.weight"),
    ("sd_v", f"{NET}extra"),
    ("sd_v", "first_stage_model.decoder.up.9.block.0.norm1.weight"),
    ("sd_v", "first_stage_model.decoder.conv_in.scale_weight"),
    ("sd_v", f"{CLIP}encoder.layers.0.mlp.fc1.scale_weight"),
    ("sd_v", f"{CLIP}encoder.layers.99.mlp.fc1.weight"),
    ("sd_v", "cond_stage_model.model.visual.proj"),
    ("sd_v", "control_model.input_blocks.0.0.weight"),
    ("sd_v", "lora_unet_mid_block.lora_up.weight"),
    ("sd_v", "edm_mean"),
    ("sdxl", "edm_vpred.sigma_max"),
    ("sdxl", f"{NET}input_blocks.0.0.scale_weight"),
    ("sdxl", "conditioner.embedders.2.whatever"),
    ("sd3", f"{NET}joint_blocks.0.x_block.attn.qkv.scale_weight"),
]
HARMLESS = [
    "model_ema.diffusion_modelinput_blocks00weight",
    "model_ema.decay",
    f"{CLIP}embeddings.position_ids",
    "betas",
    "alphas_cumprod_prev",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_mean_coef1",
    "logvar",
    "scale_factor",
    "first_stage_model.loss.logvar",
    "cond_stage_model.logit_scale",
    "text_encoders.t5xxl.transformer.shared.weight",  # the description goes without
]


@pytest.mark.sampled(
    "sd_v-scaled_fp8",
    "sd_v-model.diffusion_model.input_blocks.99.0.weight",
    "sd_v-first_stage_model.decoder.conv_in.scale_weight",
    "sd_v-cond_stage_model.model.visual.proj",
    "sd_v-control_model.input_blocks.0.0.weight",
    "sd_v-lora_unet_mid_block.lora_up.weight",
    "sdxl-edm_vpred.sigma_max",
    "sd3-model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight",
)
@pytest.mark.parametrize(("family", "key"), LEFT_OVER)
def test_what_nothing_reads_is_refused(family, key, file, monkeypatch) -> None:
    source = file(family, {key: X}, {})

    def read(*args: Any, **options: Any) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("diffusers.loaders.single_file_model.load_single_file_checkpoint", read)
    monkeypatch.setattr("diffusers.loaders.single_file.load_single_file_checkpoint", read)
    with pytest.raises(ValueError, match=r"with .*, which nothing here reads") as refused:
        load_family(source)
    assert key in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_converter_stumbles_over_is_one_line(file) -> None:
    with pytest.raises(ValueError, match=r"which Diffusers can't convert .* Name another"):
        load_family(file("sd3", {f"{NET}joint_blocks.99.x_block.attn.qkv.weight": X}, {}))


@pytest.mark.full
def test_bookkeeping_is_harmless(file) -> None:
    assert load_family(file("sd_v", {k: X.clone() for k in HARMLESS}, {}))


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("marks", "metadata", "zero_snr"),
    [
        (("v_pred",), {}, False),
        (("v_pred", "ztsnr"), {}, True),
        ((), {"modelspec.prediction_type": "v"}, False),
        (("ztsnr",), {"modelspec.prediction_type": "v"}, True),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, False),  # the tensor is ComfyUI's
    ],
)
def test_a_marked_file_is_read_as_v(family, marks, metadata, zero_snr, file) -> None:
    """Whatever the pipeline says that describes its architecture."""
    source = file(family, {name: MARK.clone() for name in marks}, metadata)
    plain = teacher_facts(source.described_at).setting
    assert plain.kind == "eps"
    setting, loaded = teacher_facts(source).setting, load_family(source)
    assert (setting.kind, loaded.kind, loaded.setting.kind) == ("v", "v", "v")
    one, half = torch.ones(1), torch.full((1,), 0.5)
    alphas = [[float(s.path.coeffs(t)[0]) for t in (one, half)] for s in (plain, setting)]
    assert alphas[0][0] > 0.05
    assert float(loaded.path.coeffs(one)[0]) == pytest.approx(alphas[1][0])
    if zero_snr:
        assert alphas[1][0] < 1e-3
    else:
        assert alphas[1] == alphas[0]


@pytest.mark.parametrize(
    ("family", "marks", "metadata"),
    [
        ("sd_v", (), {"modelspec.prediction_type": "epsilon"}),
        ("sd3", ("v_pred",), {}),
        ("sd3", ("ztsnr",), {}),
    ],
)
def test_marks_that_the_scheduler_cannot_follow_are_refused(family, marks, metadata, file) -> None:
    source = file(family, {name: MARK.clone() for name in marks}, metadata)
    for read in (teacher_facts, load_family):
        with pytest.raises(ValueError, match="single_file_config: expected a scheduler that fits"):
            read(source)


def test_eps_with_a_zero_snr_mark_alone_is_refused(file) -> None:
    with pytest.raises(ValueError, match="zero terminal SNR, got epsilon"):
        load_family(file("sd", {"ztsnr": MARK.clone()}, {}))


@pytest.mark.full
def test_unknown_metadata_says_nothing(file) -> None:
    source = file("sd", {}, {"modelspec.prediction_type": "", "modelspec.title": "v"})
    assert Path(source.model).is_file()
    assert load_family(source).kind == "eps"
