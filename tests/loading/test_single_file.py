"""Teachers in one .safetensors file: read as the pipeline they were, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.original import clip_state, denoiser_state, vae_state
from support.runs import fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.trainers import VariationalScoreTrainer, trainer_of_run


@pytest.fixture
def whole(tmp_path, tmp_path_factory) -> tuple[Path, Path]:
    """A Stable Diffusion checkpoint in the LDM layout, and the folder it was written from."""
    folder = teacher_dir("sd_v", tmp_path_factory)
    pipe = load_family(folder).pipeline
    state = {
        **denoiser_state(pipe.unet),
        **vae_state(pipe.vae),
        **clip_state(pipe.text_encoder),
    }
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", folder


def assert_same_weights(ours, theirs, parts) -> None:
    for part in parts:
        mine, other = (
            fingerprint(getattr(p, part).state_dict()) for p in (ours.pipeline, theirs.pipeline)
        )
        assert mine == other, part


def test_a_whole_checkpoint_is_the_pipeline_it_was(whole) -> None:
    path, folder = whole
    config = str(folder)
    source = ModelSource.of(path, single_file_config=config)
    assert source.pipeline_class == "StableDiffusionPipeline"
    assert teacher_facts(source).setting.kind == "v"
    assert_same_weights(
        load_family(source),
        load_family(folder),
        ("unet", "vae", "text_encoder"),
    )


@pytest.mark.full
@pytest.mark.parametrize(("family", "prefix"), [("sd3", ""), ("sd3", "model.diffusion_model.")])
def test_a_transformer_alone_takes_the_rest_from_the_folder(
    family, prefix, tmp_path, tmp_path_factory
) -> None:
    folder = teacher_dir(family, tmp_path_factory)
    theirs = load_family(folder)
    with torch.no_grad():
        for param in theirs.net.parameters():
            param += 0.5  # not the weights that lie in the folder
    path = tmp_path / "transformer.safetensors"
    save_file(denoiser_state(theirs.net, prefix), path)
    ours = load_family(ModelSource.of(path, single_file_config=str(folder)))
    assert_same_weights(ours, theirs, ("transformer", "vae", "text_encoder", "text_encoder_2"))
    assert ours.pipeline.text_encoder_3 is None


@pytest.mark.full
def test_a_run_on_it_resumes_and_exports(whole, tmp_path) -> None:
    path, folder = whole
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        tuning=Tuning(rank=2),
        disable_progress_bar=True,
    )
    source = ModelSource(str(path), single_file_config=str(folder))
    trainer = VariationalScoreTrainer(source, args, PromptDataset(["a", "b"]))
    trainer.train()
    again = trainer_of_run(tmp_path / "run")
    assert again.step == 1
    assert load_family(again.export(tmp_path / "out")).name == "sd"
    card = (again.export(tmp_path / "lora", format="lora") / "README.md").read_text()
    load = f"StableDiffusionPipeline.from_single_file({str(path)!r}, config={str(folder)!r})"
    assert load in card


def test_without_a_description_the_error_asks_for_one(whole) -> None:
    with pytest.raises(ValueError, match=r"single_file_config: expected the configuration"):
        load_family(whole[0])


def test_a_description_beside_a_folder_is_refused(whole) -> None:
    with pytest.raises(ValueError, match="single_file_config: expected none"):
        load_family(ModelSource.of(whole[1], single_file_config=str(whole[1])))


def test_a_description_of_another_architecture_is_refused(whole, tmp_path_factory) -> None:
    with pytest.raises(ValueError, match="Name another --single_file_config"):
        load_family(
            ModelSource.of(whole[0], single_file_config=str(teacher_dir("sd3", tmp_path_factory)))
        )


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.ckpt", b"\x80\x04", "Pickled weights are not read"),
        ("model.safetensors", b"\xff" * 64, "expected a whole safetensors file"),
    ],
)
def test_pickled_and_broken_files_are_refused(name, content, match, whole) -> None:
    path = whole[0].parent / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_family(ModelSource.of(path, single_file_config=str(whole[1])))


def test_a_file_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"which is not there\. Download it first"):
        load_family(tmp_path / "none.safetensors")
