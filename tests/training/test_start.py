"""A student that starts from another pipeline's denoiser, as SwiftBrush v2 does from SD-Turbo."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill import Tuning
from stepdistill.core.method import Role
from stepdistill.families.registry import load_family
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny import TINY, tiny_sd, unet
from stepdistill.testing.tiny_parts import TEXT_WIDTH
from stepdistill.trainers import trainer_of_run


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd_v", tmp_path_factory)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A pipeline of the same architecture with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny_sd("v_prediction", seed=5).save_pretrained(folder)
    return folder


def test_full_student_has_the_pipeline_s_weights_and_the_fake_the_teacher_s(
    teacher, other, tmp_path
) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "full", tmp_path, init_student_from=str(other), ema_decay=0.5
    )
    theirs = fingerprint(load_file(other / "unet" / "diffusion_pytorch_model.safetensors"))
    own = fingerprint(load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors"))
    assert fingerprint(trainer.bank.members("student")) == theirs
    assert fingerprint(trainer.bank.members("ema")) == theirs
    assert fingerprint(trainer.bank.members("fake")) == own


def test_the_run_trains_resumes_and_exports_without_its_source(teacher, other, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "full", tmp_path, init_student_from=str(other))
    trainer.train()
    found = trainer_of_run(tmp_path)
    assert fingerprint(found.bank.members("student")) == fingerprint(
        trainer.bank.members("student")
    )


def test_a_new_guidance_input_keeps_its_zeros(teacher, other, tmp_path) -> None:
    trainer = build_trainer("lcm_w", teacher, "full", tmp_path, init_student_from=str(other))
    state = trainer.bank.role_state("student")
    theirs = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    new = set(state) - set(theirs)
    assert new
    assert all(float(state[name].abs().max()) == 0.0 for name in new)
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


@pytest.mark.full
def test_an_export_is_such_a_pipeline(teacher, tmp_path) -> None:
    first = build_trainer("dmd2", teacher, "full", tmp_path / "first")
    first.train()
    out = first.export(tmp_path / "out")
    second = build_trainer("dmd2", teacher, "full", tmp_path / "b", init_student_from=str(out))
    assert fingerprint(second.bank.members("student")) == fingerprint(first.bank.members("student"))


# --------------------------------------------------------------- a LoRA student on another base
def answer(denoiser, trainer):
    """The role's output at one fixed point."""
    x = torch.randn(1, *trainer.batches.shape, generator=torch.Generator().manual_seed(2))
    cond = trainer.family.encode(["a cat"])
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.6], dtype=torch.float64), cond).raw


def plain(folder, trainer):
    """What the denoiser of a pipeline folder answers there."""
    family = load_family(folder)
    return answer(RoleBank(family, {"teacher": Role()}, Tuning())["teacher"], trainer)


@pytest.mark.full
def test_lora_student_sits_on_the_pipeline_and_the_fake_on_the_teacher(
    teacher, other, tmp_path
) -> None:
    options = {"init_student_from": str(other), "ema_decay": 0.5}
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, **options)
    before = {"teacher": plain(teacher, trainer), "student": plain(other, trainer)}
    bank = trainer.bank
    for role, like in (("teacher", "teacher"), ("fake", "teacher"), ("student", "student")):
        assert torch.equal(answer(bank[role], trainer), before[like]), role
    assert torch.equal(answer(bank["ema"], trainer), before["student"])
    assert not torch.equal(*before.values())
    frozen = {
        key: fingerprint(bank.nets[key].state_dict(), skip_adapters=True)
        for key in ("base", "student_base")
    }
    trainer.train()
    for key, was in frozen.items():
        assert fingerprint(bank.nets[key].state_dict(), skip_adapters=True) == was
    assert torch.equal(answer(bank["teacher"], trainer), before["teacher"])
    assert not torch.equal(answer(bank["student"], trainer), before["student"])
    assert not torch.equal(answer(bank["fake"], trainer), before["teacher"])


@pytest.mark.full
def test_its_gradient_survives_checkpointing(teacher, other, tmp_path) -> None:
    prints = []
    for checkpointing in (False, True):
        trainer = build_trainer(
            "dmd2",
            teacher,
            "lora",
            tmp_path / str(checkpointing),
            init_student_from=str(other),
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        prints.append(fingerprint(trainer.bank.members("student")))
    assert prints[0] == prints[1]


@pytest.mark.full
def test_it_resumes_and_exports_with_its_own_base(teacher, other, tmp_path) -> None:
    options = {"init_student_from": str(other), "checkpointing_steps": 1}
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", **options)
    trainer.train()
    made = answer(trainer.bank["student"], trainer)
    found = trainer_of_run(tmp_path / "run")
    assert torch.equal(answer(found.bank["student"], trainer), made)
    where = str(tmp_path / "run" / "checkpoint-1")
    again = build_trainer(
        "dmd2", teacher, "lora", tmp_path / "run", **options, resume_from_checkpoint=where
    )
    again.train()
    assert torch.equal(answer(again.bank["student"], trainer), made)

    found.export(tmp_path / "out")  # compared with the in-memory sampler
    torch.testing.assert_close(plain(tmp_path / "out", trainer), made, rtol=1e-4, atol=1e-5)
    lora = found.export(tmp_path / "lora", format="lora", dtype="float32")
    assert json.loads((lora / "distillation.json").read_text())["base_model"] == str(other)
    stock = load_family(other)
    stock.pipeline.load_lora_weights(str(lora))
    x = torch.randn(1, *trainer.batches.shape, generator=torch.Generator().manual_seed(2))
    told = stock.path.model_time(torch.tensor([0.6], dtype=torch.float64))
    with torch.no_grad():
        theirs = stock.forward(stock.pipeline.unet, x, told, trainer.family.encode(["a cat"]))
    torch.testing.assert_close(theirs, made, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_another_base_is_another_run(teacher, other, tmp_path) -> None:
    build_trainer("dmd2", teacher, "lora", tmp_path, init_student_from=str(other)).train()
    with pytest.raises(ValueError, match="student_base"):
        build_trainer("dmd2", teacher, "lora", tmp_path, resume_from_checkpoint="latest")


class TestRefused:
    @pytest.fixture(autouse=True)
    def _no_loading(self, request, monkeypatch) -> None:
        def refuse(*_args, **_kwargs):
            raise AssertionError("a weight was about to be loaded")

        if "architecture" not in request.node.name:
            monkeypatch.setattr("stepdistill.training.trainer.load_family", refuse)

    @pytest.mark.parametrize("name", ["sd", "dit"])
    def test_another_prediction_type_or_family(self, name, teacher, tmp_path) -> None:
        TINY[name]().save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match=r"family and prediction type \(sd, v\)"):
            build_trainer(
                "dmd2", teacher, "full", tmp_path, init_student_from=str(tmp_path / "source")
            )

    def test_a_hub_id_that_is_not_there(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match="init_student_from: expected a run, a checkpoint"):
            build_trainer("dmd2", teacher, "full", tmp_path, init_student_from="nobody/nothing")

    def test_a_decoder_of_no_use_is_told(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match="decoder: expected a folder or Hub id"):
            build_trainer("dmd2", teacher, "full", tmp_path, decoder=str(tmp_path / "none"))

    @pytest.mark.full
    def test_another_architecture(self, teacher, tmp_path) -> None:
        pipeline = tiny_sd("v_prediction")
        pipeline.unet = unet(TEXT_WIDTH, resnet_time_scale_shift="scale_shift")
        pipeline.save_pretrained(tmp_path / "source")
        for layout, whose in (("full", "student"), ("lora", "teacher")):
            with pytest.raises(ValueError, match=f"of the {whose}'s architecture"):
                build_trainer(
                    "dmd2",
                    teacher,
                    layout,
                    tmp_path / "r",
                    init_student_from=str(tmp_path / "source"),
                )
