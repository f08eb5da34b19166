"""A student that starts from another pipeline's denoiser, as SwiftBrush v2 does from SD-Turbo."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill.models.tiny import TINY, tiny_sd, unet
from stepdistill.models.tiny_parts import TEXT_WIDTH
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


def test_an_export_is_such_a_pipeline(teacher, tmp_path) -> None:
    first = build_trainer("dmd2", teacher, "full", tmp_path / "first")
    first.train()
    out = first.export(tmp_path / "out")
    second = build_trainer("dmd2", teacher, "full", tmp_path / "b", init_student_from=str(out))
    assert fingerprint(second.bank.members("student")) == fingerprint(first.bank.members("student"))


class TestRefused:
    @pytest.fixture(autouse=True)
    def _no_loading(self, request, monkeypatch) -> None:
        def refuse(*_args, **_kwargs):
            raise AssertionError("a weight was about to be loaded")

        if "architecture" not in request.node.name:
            monkeypatch.setattr("stepdistill.training.trainer.load_family", refuse)

    def test_lora_students(self, teacher, other, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"expected tuning\.student full with the pipeline"):
            build_trainer("dmd2", teacher, "lora", tmp_path, init_student_from=str(other))

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

    def test_another_architecture(self, teacher, tmp_path) -> None:
        pipeline = tiny_sd("v_prediction")
        pipeline.unet = unet(TEXT_WIDTH, resnet_time_scale_shift="scale_shift")
        pipeline.save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match="of the student's architecture"):
            build_trainer(
                "dmd2", teacher, "full", tmp_path / "r", init_student_from=str(tmp_path / "source")
            )
