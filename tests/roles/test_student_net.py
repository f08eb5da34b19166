"""Students of another architecture: what may change, what they start from, what comes out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import run, run_without_package
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.config.files import parse_run_config
from stepdistill.core.method import Role
from stepdistill.families.experts import Experts
from stepdistill.families.registry import load_family
from stepdistill.methods import METHODS
from stepdistill.roles.rolebank import BASE, RoleBank
from stepdistill.roles.student_net import check_student_config
from stepdistill.sampling import sample_images
from stepdistill.trainers import trainer_of_run


def smaller(config: Any) -> dict[str, Any]:
    """A change of a tiny denoiser's config that leaves out layers, or narrows them."""
    for name in ("num_layers", "n_layers", "num_hidden_layers", "num_single_layers"):
        if config.get(name, 0) > (name != "num_single_layers"):
            return {name: config[name] - 1}
    widths = config["block_out_channels"]
    return {"block_out_channels": [widths[0]] * len(widths)}


SMALL = {"block_out_channels": [4, 8]}  # of Stable Diffusion's tiny UNet
ROLES = {
    "teacher": Role(),
    "student": Role(train=True),
    "fake": Role(train=True),
    "target": Role(ema_of="student"),
}


def size(bank: RoleBank, role: str) -> int:
    return sum(p.numel() for p in bank.members(role).values())


def small_trainer(case: str, family: str, factory: Any, out: Path, **options: Any) -> Any:
    teacher = teacher_dir(family, factory)
    given = smaller(load_family(teacher).config)
    tuning = Tuning(student="full", rank=2, student_config=given)
    return build_trainer(case, teacher, "full", out, tuning=tuning, **options)


@pytest.mark.sampled("dit", "edm", "flux", "sd", "sd3", "wan", "pixart", "z_image")
def test_every_family_builds_and_calls_a_smaller_student(family) -> None:
    if isinstance(family.net, Experts):
        pytest.skip(
            "a student of another size is of one expert: tests/training/test_expert_runs.py"
        )
    given = smaller(family.config)
    torch.manual_seed(0)
    if set(given) & set(getattr(family, "shared_config", ())):
        with pytest.raises(ValueError, match="got other values of block_out_channels"):
            RoleBank(family, ROLES, Tuning(student="full", fake="full", student_config=given))
        return  # a ControlNet's residuals fit a UNet of its own widths alone
    bank = RoleBank(family, ROLES, Tuning(student="full", fake="full", student_config=given))
    teacher = sum(p.numel() for p in bank.nets[BASE].parameters())
    assert size(bank, "student") < size(bank, "fake") == teacher
    assert fingerprint(bank.members("target")) == fingerprint(bank.members("student"))
    x_t = torch.randn(2, *family.sample_shape())
    cond = family.encode([0, 1] if family.conditioning == "label" else ["a", "b"])
    t = torch.full((2,), 0.5, dtype=torch.float64)
    assert bank["student"](x_t, t, cond).raw.shape == x_t.shape
    assert bank["target"](x_t, t, cond).raw.isfinite().all()


@pytest.mark.full
def test_nothing_is_copied_and_the_seed_decides(make_family) -> None:
    """Even where shapes agree: a student of the teacher's own sizes starts at random."""
    banks = []
    for seed in (0, 0, 1):
        family = make_family("sd")
        torch.manual_seed(seed)
        tuning = Tuning(student="full", student_config={"block_out_channels": [8, 16]})
        banks.append(RoleBank(family, {"student": Role(train=True)}, tuning))
    own = [fingerprint(bank.members("student")) for bank in banks]
    assert own[0] == own[1] != own[2]
    base = fingerprint(dict(banks[0].nets[BASE].named_parameters()))
    alike = {name for name in base if base[name] == own[0][name]}
    assert all("norm" in name or name.endswith("bias") for name in alike)  # ones and zeros


def test_a_head_cannot_read_it(make_family) -> None:
    tuning = Tuning(student="full", student_config=SMALL)
    family = make_family("sd")
    bank = RoleBank(family, {"student": Role(train=True)}, tuning)
    x_t, t = torch.randn(1, *family.sample_shape()), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="features of roles with the teacher's architecture"):
        bank["student"](x_t, t, family.encode(["a"]), features=("mid",))


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("sd", {"block_out_chanels": [4, 8]}, r"got \['block_out_chanels'\].*block_out_channels"),
        ("sd", {"in_channels": 8}, "in_channels 4, given 8"),
        ("sd", {"cross_attention_dim": 32}, "cross_attention_dim 16, given 32"),
        ("sd3", {"joint_attention_dim": 8, "sample_size": 16}, "joint_attention_dim 32, given 8"),
        ("dit", {"sample_size": 16}, "sample_size 8, given 16"),
        ("sd", {"_class_name": "UNet2DModel"}, "config of UNet2DConditionModel"),
        ("sd", {"block_out_channels": [4]}, "sizes that UNet2DConditionModel can be built with"),
    ],
)
def test_bad_configs_are_refused_before_a_weight_is_read(
    family, given, message, tmp_path_factory, monkeypatch, tmp_path
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("stepdistill.training.trainer.load_family", loads)
    tuning = Tuning(student="full", student_config=given)
    with pytest.raises(ValueError, match=message):
        build_trainer("reflow", teacher, "full", tmp_path, tuning=tuning)
    with pytest.raises(ValueError, match=message):
        check_student_config(given, teacher)


def test_a_caption_projection_frees_the_inner_width(tmp_path_factory) -> None:
    given = {"num_attention_heads": 1, "cross_attention_dim": 12}
    check_student_config(given, teacher_dir("pixart", tmp_path_factory))


def test_lora_students_have_no_architecture_of_their_own() -> None:
    with pytest.raises(ValueError, match="student 'full' beside it"):
        Tuning(student="lora", student_config={"layers_per_block": 1})


def test_a_method_may_refuse(monkeypatch, tmp_path, tmp_path_factory) -> None:
    monkeypatch.setattr(METHODS["reflow"], "any_student", False)
    with pytest.raises(ValueError, match=r"reflow: expected no tuning\.student_config"):
        small_trainer("reflow", "sd", tmp_path_factory, tmp_path)


# ------------------------------------------------------------------------------ files and flags
def test_a_config_file_is_read_once(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    config = json.loads((teacher / "unet" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "block_out_channels": [4, 8]}))
    tuning = Tuning(student="full", student_config=str(path))
    path.unlink()
    again = Tuning(**tuning.model_dump(mode="json"))
    assert again == tuning
    assert again.student_changes["block_out_channels"] == [4, 8]
    check_student_config(again.student_changes, teacher)
    with pytest.raises(ValueError, match="a mapping or a JSON file"):
        Tuning(student="full", student_config=str(path))


def test_flags_take_a_mapping_or_a_path(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"layers_per_block": 1}')
    for told in ('{"layers_per_block": 1}', str(path)):
        flags = ["--pretrained_model_name_or_path", "m", "--tuning.student", "full"]
        run = parse_run_config([*flags, "--tuning.student_config", told], method="reflow")
        assert run.tuning.student_changes == {"layers_per_block": 1}
        assert TrainConfig(**run.train_config().model_dump()).tuning == run.tuning


# ------------------------------------------------------------------------------------- whole runs
FRESH = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
noise = torch.from_numpy(np.load(sys.argv[2]))
image = pipe("a", latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
np.save(sys.argv[3], image[0])
assert not [name for name in sys.modules if name.split(".")[0] == "stepdistill"]
# The export's own addition is a guidance input of zeros: with it the stock call needs no guidance.
print(sum(p.numel() for n, p in pipe.unet.named_parameters() if "cond_proj" not in n))
"""


@pytest.mark.full
def test_dmd2_with_a_smaller_student_exports_to_stock_diffusers(tmp_path, tmp_path_factory) -> None:
    out = tmp_path / "run"
    trainer = small_trainer("dmd2", "sd_v", tmp_path_factory, out, ema_decay=0.5)
    trainer.train()
    found = trainer_of_run(out)
    for role in ("student", "fake", "ema"):
        assert fingerprint(found.bank.members(role)) == fingerprint(trainer.bank.members(role))
    folder = found.export(tmp_path / "pipeline")
    record = json.loads((folder / "distillation.json").read_text())
    assert record["run"]["tuning"]["student_config"] == smaller(trainer.family.config)
    noise = torch.randn(1, *trainer.family.sample_shape(), generator=torch.manual_seed(3))
    np.save(tmp_path / "noise.npy", noise.numpy())
    files = [folder, tmp_path / "noise.npy", tmp_path / "image.npy"]
    done = run(partial(run_without_package, FRESH, *map(str, files)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == size(trainer.bank, "ema")
    image = np.load(tmp_path / "image.npy")
    assert np.isfinite(image).all()
    assert image.std() > 0
    with pytest.raises(ValueError, match="LoRA student"):
        found.export(tmp_path / "lora", format="lora")


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "family"), [("cd", "sd3"), ("vsd", "sd"), ("reflow_raw", "sd_v"), ("lcm_w", "sd")]
)
def test_other_methods_train_resume_and_sample(case, family, tmp_path, tmp_path_factory) -> None:
    trainer = small_trainer(case, family, tmp_path_factory, tmp_path / "run", checkpointing_steps=1)
    before = fingerprint(trainer.bank.members("student"))
    trainer.train()
    after = fingerprint(trainer.bank.members("student"))
    assert all(before[name] != after[name] for name in before)
    again = small_trainer(
        case,
        family,
        tmp_path_factory,
        tmp_path / "run",
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"),
    )
    again.train()
    assert fingerprint(again.bank.members("student")) == after
    (image,) = sample_images(again.student(), again.family, again.method.sampler(), ["a"])
    assert np.asarray(image).std() > 0
