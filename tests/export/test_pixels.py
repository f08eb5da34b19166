"""Pixel-space students, VP and EDM: stock folders, their samplers, and data without prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline
from PIL import Image
from support.runs import TinyData, build_trainer, teacher_dir

import stepdistill
from stepdistill import TrainConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import EmptyRows
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.export.schedulers import stock_sampler
from stepdistill.families.edm import EDMFamily
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.testing.tiny_pixels import pixel_unet, tiny_edm, tiny_unet2d
from stepdistill.trainers import DistributionMatchingTrainer

CONFIGS = Path(__file__).parents[2] / "configs"
FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}
CASES = [
    ("unet2d", 1, "renoise"),
    ("unet2d", 4, "renoise"),
    ("unet2d", 4, "ode"),
    ("edm", 1, "ode"),
    ("edm", 2, "renoise"),
    ("edm", 4, "renoise"),
    ("edm_plain", 1, "renoise"),
    ("edm_plain", 4, "ode"),
    ("edm_plain", 2, "ode"),
]


def moved(trainer: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        param.data += 0.05 * torch.randn(param.shape, generator=generator)
    return trainer


@pytest.mark.full
@pytest.mark.parametrize(("family", "steps", "kind"), CASES)
def test_stock_image_equals_in_memory(family, steps, kind, tmp_path, tmp_path_factory) -> None:
    """export_pipeline compares; one EDM step needs no argument, for the class's default is 1."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    spec = SamplerSpec(uniform_grid(steps), kind)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    record = json.loads((out / RECORD).read_text())
    one_by_default = steps == 1 and family != "unet2d"
    assert record["typed"] == ({} if one_by_default else {"num_inference_steps": steps})
    assert record["guidance_scale"] is None
    assert "There is no guidance." in (out / "README.md").read_text()
    assert stepdistill.load_pipeline(out)(output_type="pt").images.shape == (1, 3, 8, 8)


@pytest.mark.full
@pytest.mark.parametrize("family", ["unet2d", "edm", "edm_plain"])
def test_trained_student_round_trips(family, tmp_path, tmp_path_factory) -> None:
    options = {"tuning": stepdistill.Tuning(student="full", fake="lora", rank=2)}
    teacher = teacher_dir(family, tmp_path_factory)
    case = "reflow" if family == "edm_plain" else "dmd2"
    trainer = build_trainer(case, teacher, "full", tmp_path / "run", **options)
    trainer.train()
    out = trainer.export(tmp_path / "out")
    assert not list(out.rglob("*.bin"))
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__module__.startswith("diffusers.pipelines")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("restarts", [True, False])
def test_ve_schedulers_visit_the_uniform_grid(steps, restarts) -> None:
    """No wasted call and no other sigma than the student's own, up to float32."""
    family = EDMFamily(tiny_edm(restarts=restarts))
    path: VEPath = family.path  # type: ignore[assignment]
    spec = SamplerSpec(uniform_grid(steps), "renoise" if restarts else "ode")
    made = stock_sampler(family.pipeline.scheduler, path, spec)
    times = torch.tensor(spec.times)
    told = path.model_time(times)
    made.scheduler.set_timesteps(steps)
    assert made.scheduler.sigmas[:steps].tolist() == pytest.approx(
        path.coeffs(times)[1].tolist(), rel=1e-4
    )
    assert made.scheduler.timesteps.tolist() == pytest.approx(told.tolist(), abs=2e-2)


@pytest.mark.parametrize(
    ("restarts", "spec", "message"),
    [
        (True, SamplerSpec(uniform_grid(2), "ode"), "kind renoise"),
        (False, SamplerSpec(uniform_grid(2), "renoise"), "kind ode"),
        (False, SamplerSpec((1.0, 0.9, 0.5), "ode"), "uniform grid"),
        (False, SamplerSpec(uniform_grid(8), "ode"), "below sigma_min 0.002.*last of 8 steps"),
        (True, SamplerSpec((0.5,), "renoise"), "uniform grid"),
    ],
)
def test_ve_specs_without_a_stock_sampler_are_refused(restarts, spec, message) -> None:
    family = EDMFamily(tiny_edm(restarts=restarts))
    with pytest.raises(ValueError, match=message):
        stock_sampler(family.pipeline.scheduler, family.path, spec)


# ---------------------------------------------------------------- consistency models (EDM teacher)
def cd_run(folder, tmp_path_factory) -> Any:
    """configs/methods/cd.yaml's method on a tiny EDM network, pushed off its start."""
    raw = yaml.safe_load((CONFIGS / "methods" / "cd.yaml").read_text())
    args = TrainConfig(
        output_dir=str(folder),
        max_train_steps=1,
        train_batch_size=2,
        disable_progress_bar=True,
        tuning=stepdistill.Tuning(student="full"),
    )
    data = TinyData((3, 8, 8), "label", ("x0",))
    teacher = str(teacher_dir("edm", tmp_path_factory))
    trainer = stepdistill.ConsistencyTrainer(
        teacher, args, data, method_config=raw["method_config"]
    )
    trainer.train()
    return moved(trainer)


@pytest.mark.full
def test_cd_of_an_edm_teacher_exports_as_a_consistency_model(tmp_path, tmp_path_factory) -> None:
    """41 Karras points; each folder, loaded by Diffusers, makes the sampler's image."""
    trainer = cd_run(tmp_path / "run", tmp_path_factory)
    for steps, indices in {1: [0], 2: [20, 0], 3: [26, 13, 0], 4: [30, 20, 10, 0]}.items():
        record = json.loads(
            (trainer.export(tmp_path / str(steps), num_steps=steps) / RECORD).read_text()
        )
        assert record["call"] == {}, "the saved scheduler alone must visit the grid"
        pipe = DiffusionPipeline.from_pretrained(tmp_path / str(steps))
        pipe.set_progress_bar_config(disable=True)
        config = pipe.scheduler.config
        assert (type(pipe.scheduler).__name__, config.num_train_timesteps, config.sigma_min) == (
            "CMStochasticIterativeScheduler",
            41,
            0.002,
        )
        typed = {"num_inference_steps": None, "timesteps": indices}
        by_number, by_index = (
            pipe(
                class_labels=[3],
                generator=torch.Generator().manual_seed(5),
                output_type="pt",
                **call,
            ).images
            for call in ({"num_inference_steps": steps}, typed)
        )
        assert torch.equal(by_number, by_index)


def test_cd_steps_off_the_stock_stride_are_typed() -> None:
    """40 points: the scheduler would stride by 20 = 40 // 2, the 39 trained intervals by 19."""
    family = EDMFamily(tiny_edm())
    spec = Consistency(ConsistencyConfig(num_grid=39), Setting(family.path, "x0")).sampler(2)
    assert stock_sampler(family.pipeline.scheduler, family.path, spec).call == {
        "timesteps": [19, 0]
    }


def test_a_boundary_of_another_sigma_data_is_refused() -> None:
    family = EDMFamily(tiny_edm())
    family.pipeline.scheduler.register_to_config(sigma_data=1.0)
    spec = SamplerSpec((1.0,), boundary_sigma=0.002)
    with pytest.raises(ValueError, match=r"sigma_data 0\.5, got 1"):
        stock_sampler(family.pipeline.scheduler, family.path, spec)


# ------------------------------------------------------------------------------------ the adapters
def test_edm_preconditioning_is_karras_table_1() -> None:
    """D of a network that returns zeros is c_skip x; of ones, c_out more."""
    family = EDMFamily(tiny_edm())
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([80.0, 0.3]).double()
    told = 250 * sigma.log()
    zero = family.from_raw(torch.zeros_like(x), x, told)
    one = family.from_raw(torch.ones_like(x), x, told)
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert torch.allclose(zero, skip.view(-1, 1, 1, 1).float() * x, atol=1e-7)
    assert torch.allclose((one - zero)[:, 0, 0, 0].double(), out, atol=1e-6)


def test_time_of_inverts_model_time_on_a_ve_path() -> None:
    path = VEPath(time_scale=250.0)
    times = torch.tensor([1.0, 0.75, 0.3], dtype=torch.float64)
    assert torch.allclose(path.time_of(path.model_time(times)), times, atol=1e-9)


def test_ddim_pipeline_is_held_as_ddpm(tmp_path) -> None:
    """Its constructor would turn an exported LCM or flow scheduler into DDIM's."""
    tiny = tiny_unet2d()
    DDIMPipeline(tiny.unet, tiny.scheduler).save_pretrained(tmp_path)
    assert isinstance(load_family(tmp_path).pipeline, DDPMPipeline)


def test_unets_no_stock_call_serves_are_refused() -> None:
    tiny = tiny_unet2d()
    with pytest.raises(ValueError, match="expected a UNet without classes, got 4"):
        UNet2DFamily(DDPMPipeline(pixel_unet(classes=4), tiny.scheduler))
    with pytest.raises(ValueError, match="from 1 or 3 channels"):
        UNet2DFamily(tiny_unet2d(channels=2))


def test_grey_pixels() -> None:
    family = UNet2DFamily(tiny_unet2d(channels=1))
    images = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    assert torch.allclose(family.images(family.latents(images)), images, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "told"), [("unet2d", "none"), ("edm", "label"), ("edm_plain", "none")]
)
def test_conditioning_is_read_before_weights(name, told, tmp_path_factory) -> None:
    assert teacher_facts(teacher_dir(name, tmp_path_factory)).conditioning == told


# ------------------------------------------------------------------ guidance, and data without text
def args_of(folder: Any) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder), max_train_steps=1, train_batch_size=2, disable_progress_bar=True
    )


def test_guidance_without_a_null_is_refused_before_weights(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("unet2d", tmp_path_factory)
    with pytest.raises(ValueError, match=r"no null condition.*guidance 1\.75. Set it to 1"):
        DistributionMatchingTrainer(str(teacher), args_of(tmp_path), EmptyRows())
    with pytest.raises(ValueError, match=r"guidance_range \(4.0, 16.0\). Set it to \[1, 1\]"):
        stepdistill.ConsistencyTrainer(str(teacher), args_of(tmp_path), EmptyRows())


def test_guided_call_without_a_null_is_refused(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer("dmd2", teacher_dir("edm", tmp_path_factory), "lora", tmp_path / "run")
    family, x = trainer.family, torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="has no null condition"):
        sample_x0(
            trainer.bank["teacher"], SamplerSpec((1.0,)), x, family.encode([0]), family.null(1), 2.0
        )


@pytest.mark.full
def test_a_folder_of_images_is_enough(tmp_path, tmp_path_factory) -> None:
    for i in range(3):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        Image.new("RGB", (9, 9), (40 * i, 0, 255)).save(tmp_path / "data" / str(i) / "a.png")
    data = ImageFolderDataset(tmp_path / "data", 8, plain=True)
    assert len(data) == 3
    assert set(data[0]) == {"image", "content"}
    trainer = stepdistill.ConsistencyTrainer(
        str(teacher_dir("unet2d", tmp_path_factory)),
        args_of(tmp_path / "run"),
        data,
        method_config={"guidance_range": (1.0, 1.0)},
    )
    assert torch.isfinite(torch.tensor(list(trainer.train().values()))).all()


@pytest.mark.full
def test_launcher_needs_no_data_for_an_unconditional_model(tmp_path, tmp_path_factory) -> None:
    from stepdistill.trainers import launch

    teacher = str(teacher_dir("unet2d", tmp_path_factory))
    argv = ["--pretrained_model_name_or_path", teacher, "--output_dir", str(tmp_path / "run")]
    argv += ["--max_train_steps", "1", "--train_batch_size", "2", "--method_config.guidance", "1"]
    argv += ["--tuning.rank", "2", "--disable_progress_bar"]
    launch(argv, DistributionMatchingTrainer)
    assert (tmp_path / "run" / "pipeline" / RECORD).is_file()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(SystemExit, match="expected images or no data"):
        launch(
            [*argv, "--data.prompts_file", str(tmp_path / "prompts.txt")],
            DistributionMatchingTrainer,
        )
