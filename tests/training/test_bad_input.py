"""Bad input gets one clear error before any weight loads, and loses nothing."""

from __future__ import annotations

import json

import pytest
import torch
from support.runs import build_trainer, teacher_dir

from stepdistill import DistributionMatchingTrainer, ReflowTrainer, TrainConfig
from stepdistill.core.types import Losses
from stepdistill.data.stream import PromptDataset
from stepdistill.loading.source import ModelSource
from stepdistill.storage.checkpoints import newest_valid


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


@pytest.mark.usefixtures("no_loading")
class TestBeforeLoading:
    def test_unknown_method(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match="dmd2"):
            DistributionMatchingTrainer(
                teacher, TrainConfig(output_dir=str(tmp_path)), ["a"], method="dmd3"
            )

    def test_method_of_another_trainer(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match="ConsistencyTrainer"):
            DistributionMatchingTrainer(
                teacher, TrainConfig(output_dir=str(tmp_path)), ["a"], method="consistency"
            )

    def test_folder_that_is_no_pipeline(self, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"model_index\.json"):
            DistributionMatchingTrainer(
                tmp_path, TrainConfig(output_dir=str(tmp_path / "o")), ["a"]
            )

    def test_unserved_pipeline_class(self, tmp_path) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiPipeline"}))
        with pytest.raises(ValueError, match="DiTPipeline"):
            DistributionMatchingTrainer(
                tmp_path, TrainConfig(output_dir=str(tmp_path / "o")), ["a"]
            )

    @pytest.mark.parametrize(
        ("options", "settings", "told"),
        [
            (
                {"fake_toward_student": 0.02},
                {"tuning": {"fake": "full"}},
                "fake and student stored alike, .*got full and lora of rank 64, alpha 64",
            ),
            (
                {"fake_toward_student": 0.02},
                {"tuning": {"fake_rank": 8}},
                "got lora of rank 8, alpha 8 and lora of rank 64, alpha 64",
            ),
            (
                {"approach": {"share": 0.75}},
                {"tuning": {"fake": "full"}},
                r"tuning\.fake: expected lora .*, got full",
            ),
            (
                {"approach": {"share": 0.75}},
                {"compile": True},
                "expected no --compile beside approach",
            ),
        ],
    )
    def test_roles_that_cannot_be_mixed(self, teacher, tmp_path, options, settings, told) -> None:
        args = TrainConfig(output_dir=str(tmp_path / "o"), **settings)
        with pytest.raises(ValueError, match=told):
            DistributionMatchingTrainer(
                teacher, args, PromptDataset(["a"]), method="dmd2", method_config=options
            )

    @pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
    def test_a_launcher_that_is_not_served(self, teacher, tmp_path, monkeypatch, name) -> None:
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(ValueError, match=rf"DDP or FSDP2, got {name}.*fsdp2\.yaml"):
            DistributionMatchingTrainer(
                teacher, TrainConfig(output_dir=str(tmp_path / "o")), ["a prompt"]
            )

    @pytest.mark.parametrize(
        ("setting", "value", "told"),
        [
            ("FSDP_VERSION", "1", r"expected fsdp_version 2, got 1.*fsdp2\.yaml"),
            ("FSDP_OFFLOAD_PARAMS", "true", "expected fsdp_offload_params false, got true"),
        ],
    )
    def test_a_launcher_of_another_fsdp(
        self, teacher, tmp_path, monkeypatch, setting, value, told
    ) -> None:
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
            monkeypatch.setenv(name, {"FSDP_VERSION": "2"}.get(name, "true"))
        monkeypatch.setenv(setting, value)
        with pytest.raises(ValueError, match=told):
            DistributionMatchingTrainer(
                teacher, TrainConfig(output_dir=str(tmp_path / "o")), ["a prompt"]
            )

    @pytest.mark.parametrize(
        ("option", "told"),
        [
            ({"mixed_precision": "fp16"}, "expected no or bf16 under FSDP2, got fp16"),
            ({"optimizer": "adamw_8bit"}, "expected adamw under FSDP2, got adamw_8bit"),
            ({"compile": True}, "expected false under FSDP2, got true"),
            ({"tuning": {"base_quantization": "int8"}}, "expected none under FSDP2, got int8"),
        ],
    )
    def test_what_does_not_go_in_shards(self, teacher, tmp_path, monkeypatch, option, told) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        args = TrainConfig(output_dir=str(tmp_path / "o"), **option)
        with pytest.raises(ValueError, match=told):
            DistributionMatchingTrainer(teacher, args, ["a prompt"])

    def test_unmet_data_needs(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"noise.*stepdistill pairs"):
            ReflowTrainer(teacher, TrainConfig(output_dir=str(tmp_path)), ["a prompt"])

    def test_no_prompts(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match="at least one prompt"):
            DistributionMatchingTrainer(teacher, TrainConfig(output_dir=str(tmp_path)), [])

    def test_output_dir_that_holds_a_run(self, teacher, tmp_path) -> None:
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="resume_from_checkpoint latest"):
            DistributionMatchingTrainer(teacher, TrainConfig(output_dir=str(tmp_path)), ["a"])
        assert (tmp_path / "run.json").read_text() == "{}"

    def test_resume_of_another_run(self, teacher, tmp_path) -> None:
        saved = {"model": "other", "method": "dmd2", "seed": 3}
        (tmp_path / "run.json").write_text(json.dumps(saved))
        args = TrainConfig(output_dir=str(tmp_path), resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match=r"'other' \(saved\)"):
            DistributionMatchingTrainer(teacher, args, ["a"])


def test_empty_prompt_file(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"p\.txt.*at least one prompt"):
        PromptDataset.from_file(tmp_path / "p.txt")


def test_rates_of_untrained_roles(teacher, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"role_learning_rates.*faek"):
        build_trainer("dmd2", teacher, "lora", tmp_path, role_learning_rates={"faek": 1.0})


def test_steps_off_the_trained_grid(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path)
    with pytest.raises(ValueError, match="trained grid"):
        trainer.export(tmp_path / "out", num_steps=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_another_global_batch_at_resume(teacher, tmp_path) -> None:
    build_trainer("dmd2", teacher, "lora", tmp_path).train()
    again = build_trainer(
        "dmd2", teacher, "lora", tmp_path, resume_from_checkpoint="latest", train_batch_size=3
    )
    with pytest.raises(ValueError, match="saved global batch of 2"):
        again.train()


def test_non_finite_loss_names_step_and_keeps_the_checkpoint(
    teacher, tmp_path, monkeypatch
) -> None:
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path, checkpointing_steps=1, max_train_steps=5
    )
    method = trainer.method
    real = method.phases

    def poisoned(step: int):
        phases = list(real(step))
        if step == 3:
            loss = phases[-1].loss

            def broken(nets, batch, ctx):
                out = loss(nets, batch, ctx)
                return Losses(out.total * torch.nan, out.logs)

            phases[-1] = type(phases[-1])(phases[-1].name, broken, phases[-1].trains)
        return phases

    monkeypatch.setattr(method, "phases", poisoned)
    with pytest.raises(FloatingPointError, match=r"fake.*step 3.*checkpoint-3"):
        trainer.train()
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-3"


def test_registry_refuses_broken_json(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="valid JSON"):
        assert ModelSource.of(tmp_path).pipeline_class
