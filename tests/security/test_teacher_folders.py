"""A teacher's folder that can't be right is refused on paper: one line, file and value named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from support.runs import teacher_dir

from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.schedule import read_schedule

INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
TEXT, SCHEDULER = "text_encoder/config.json", "scheduler/scheduler_config.json"
SIDE = "a whole number from 1 to 16384"
# file, what is written into it, what the line says
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        INDEX,
        {"unet": [None, None]},
        "expected a class for unet, got [None, None]",
    ),
    (INDEX, {"vae": [None, None]}, "expected a class for vae, got [None, None]"),
    (INDEX, {"scheduler": [None, None]}, "expected a class for scheduler, got [None, None]"),
    (INDEX, {"unet": ["diffusers"]}, "expected a class for unet, got ['diffusers']"),
    (UNET, {"sample_size": 10**9}, f"{UNET}: expected sample_size to be {SIDE}, got 1000000000"),
    (UNET, {"sample_size": "big"}, f"{UNET}: expected sample_size to be {SIDE}, got 'big'"),
    (UNET, {"sample_size": [8, -8]}, f"{UNET}: expected sample_size to be {SIDE}, got [8, -8]"),
    (UNET, {"out_channels": 10**9}, f"{UNET}: expected the network of diffusion_pytorch_model"),
    (UNET, {"in_channels": 10**9}, f"{UNET}: expected in_channels 4 in a StableDiffusionPipeline"),
    (UNET, {"in_channels": 9}, "got 9. Save it as the pipeline that it is of (StableDiffusionInp"),
    (UNET, {"in_channels": 8}, "expected in_channels 4 in a StableDiffusionPipeline"),
    (VAE, {"latent_channels": 16}, "expected in_channels 16 in a StableDiffusionPipeline, got 4. "),
    (UNET, {"block_out_channels": [10**8] * 2}, "got a description of one with (100000000,"),
    (UNET, {"cross_attention_dim": None}, f"{UNET}: expected a config that UNet2DConditionModel"),
    (VAE, {"scaling_factor": 0}, "expected scaling_factor to be a finite number other than 0"),
    (VAE, {"scaling_factor": math.nan}, "a finite number other than 0, got nan"),
    (TEXT, {"hidden_size": 10**9}, f"{TEXT}: expected "),
    (TEXT, {"num_hidden_layers": -1}, "expected num_hidden_layers to be a whole number from 0"),
    (SCHEDULER, {"num_train_timesteps": -1}, "expected num_train_timesteps to be a whole number"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "from 1 to 100000, got 1000000000000"),
    (SCHEDULER, {"beta_start": math.nan}, "expected beta_start to be a number between 0 and 1"),
    (UNET, {"_class_name": "SD3Transformer2DModel"}, "_class_name UNet2DConditionModel, as model_"),
    (UNET, {"_class_name": 3}, f"{UNET}: expected _class_name UNet2DConditionModel, as model_"),
    (
        UNET,
        {"_class_name": ["a", "b"]},
        "names UNet2DConditionModel, got ['a', 'b']. Save the pipe",
    ),
    (UNET, {"_class_name": None}, "names UNet2DConditionModel, got None"),
    (VAE, {"_class_name": "AutoencoderTiny"}, f"{VAE}: expected _class_name AutoencoderKL, as mod"),
    (VAE, {"_class_name": "Transformer2DModel"}, "AutoencoderKL, got 'Transformer2DModel'"),
    (TEXT, {"model_type": "t5"}, f"{TEXT}: expected model_type clip_text_model, as model_index.js"),
    (TEXT, {"model_type": 3}, "as model_index.json names CLIPTextModel, got 3. Save the pipeline"),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of DDIMScheduler, which mode"),
    (SCHEDULER, {"_class_name": "OddScheduler"}, f"{SCHEDULER}: expected a configuration of DDIM"),
    (SCHEDULER, {"steps_offset": 10**9}, f"{SCHEDULER}: expected steps_offset to be a whole num"),
    (SCHEDULER, {"beta_schedule": "odd"}, "expected a readable scheduler config, got odd is not"),
    (SCHEDULER, {"prediction_type": "odd"}, "or 'v_prediction', got 'odd'. Correct it"),
]


@pytest.fixture
def teacher(tmp_path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(teacher_dir("sd_v", tmp_path_factory), tmp_path / "teacher"))


def read_no_weight(*args: Any, **options: Any) -> None:
    pytest.fail("a weight was read")


@pytest.mark.parametrize(("file", "values", "line"), WRONG, ids=lambda x: str(x)[:40])
def test_on_paper(teacher, monkeypatch, file, values, line) -> None:
    content = json.loads((teacher / file).read_text())
    (teacher / file).write_text(json.dumps({**content, **values}))
    monkeypatch.setattr("safetensors.torch.load_file", read_no_weight)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", read_no_weight)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the line is data)
        load_family(teacher)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(teacher) in str(refused.value) or file == SCHEDULER


@pytest.mark.parametrize("file", [INDEX, UNET, VAE, SCHEDULER])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "null", "[1]", "{"])
def test_broken_configurations(teacher, file, content) -> None:
    (teacher / file).write_text(content)
    with pytest.raises(ValueError, match=r"expected"):
        load_family(teacher)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (UNET, {"_class_name": "FlaxUNet2DConditionModel"}),
        (SCHEDULER, {"_class_name": "PNDMScheduler"}),
        (TEXT, {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_file_of_a_former_or_kindred_class_is_read_as_before(teacher, file, values) -> None:
    whole, content = load_family(teacher), json.loads((teacher / file).read_text())
    if file == TEXT:  # of a model of two parts, of which this is one
        values = {**values, "text_config": content}
    (teacher / file).write_text(json.dumps({**content, **values}))
    family = load_family(teacher)
    one, other = (f.encode(["a cat"]).tensors for f in (whole, family))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (family.kind, family.shift) == (whole.kind, whole.shift)
    t = torch.linspace(0, 1, 9)
    assert torch.equal(family.path.coeffs(t)[0], whole.path.coeffs(t)[0])


def test_a_folder_that_is_right_loads(teacher) -> None:
    assert load_family(teacher).kind == teacher_facts(teacher).setting.kind == "v"


def test_eps_with_zero_terminal_snr_is_refused_whatever_the_table_ends_with() -> None:
    """Euler's ends at 2^-24: alpha(1) is 2.4e-4, not 0."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, **betas)
    assert 0 < float(scheduler.alphas_cumprod[-1]) < 1e-6
    with pytest.raises(ValueError, match="zero terminal SNR, got epsilon"):
        read_schedule(scheduler)
    path, kind, _ = read_schedule(
        EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **betas)
    )
    assert kind == "v"
    assert float(path.coeffs(torch.ones(1))[0]) < 1e-3
