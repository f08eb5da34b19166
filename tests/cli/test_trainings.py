"""Recipes of several trainings: one command, in order, resumed anywhere, equal to its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.resume import same_tensors
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.config.layers import several_trainings
from stepdistill.config.trainings import parse_trainings
from stepdistill.pairs.teacher import make_pairs
from stepdistill.trainers import DistillationTrainer

SMALL = {"learning_rate": 1e-2, "tuning": {"student": "lora", "fake": "lora", "rank": 2}}
PROMPTS = ("a cat", "a dog", "the sea")


def part(**more: Any) -> dict[str, Any]:
    return {"about": "one", "base": [], "steps": [1], "data": "prompts", "options": {}, **more}


def recipe(folder: Path, data: str, trainings: dict[str, Any], **values: Any) -> str:
    """A recipe's file."""
    about = {"about": "a", "base": [], "steps": [1], "data": data, "trainings": trainings}
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"recipe": about, **values}, sort_keys=False))
    return str(file)


def segments(folder: Path) -> str:
    """Two segments, then one, then score distillation: Hyper-SD in small."""
    method = {"num_grid": 4, "stage_starts": []}
    tscd = {"method": "tscd", "method_config": method}
    return recipe(
        folder,
        "images",
        {
            "two": part(options={**tscd, "method_config": {**method, "segments": [2]}}),
            "one": part(
                student_of="two",
                lora={"all": 2},
                options={**tscd, "method_config": {**method, "segments": [1], "sampler": "tcd"}},
            ),
            "score": part(
                student_of="one",
                lora={"1-step": 1},
                options={"method": "dmd2", "method_config": {"num_steps": 1, "critic_steps": 1}},
            ),
        },
        **SMALL,
    )


def flags(teacher: Path, out: Path, data: list[str]) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(teacher), "--output_dir", str(out), *data),
        *("--max_train_steps", "2", "--checkpointing_steps", "1", "--validation_steps", "0"),
        "--disable_progress_bar",
    ]


def images(folder: Path) -> list[str]:
    (folder / "pictures").mkdir()
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (90 * i, 20, 200)).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(prompt)
    return ["--data.train_data_dir", str(folder / "pictures")]


def prompts(folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return ["--data.prompts_file", str(folder / "prompts.txt")]


@pytest.mark.full
def test_it_goes_on_where_it_was_stopped_and_equals_its_parts(
    tmp_path, tmp_path_factory, monkeypatch, capsys
) -> None:
    teacher, out, file = teacher_dir("sd_v", tmp_path_factory), tmp_path / "out", segments(tmp_path)
    argv = ["train", "--recipe", file, *flags(teacher, out, images(tmp_path))]
    train, begun = DistillationTrainer.train, []

    def cut_off(self: Any, until: int | None = None) -> Any:
        begun.append(self.output_dir.name)
        if begun == ["two", "one"]:
            train(self, until=1)
            raise SystemExit(75)
        return train(self, until)

    monkeypatch.setattr(DistillationTrainer, "train", cut_off)
    with pytest.raises(SystemExit, match="75"):
        main(argv)
    main(argv)
    assert begun == ["two", "one", "one", "score"]
    said = capsys.readouterr().out
    assert "training 3 of 3, score: one" in said
    main(argv)  # all is there: nothing is trained again
    assert len(begun) == 4

    # The second one is the plain command on its part.
    alone = [arg if arg != str(out) else str(tmp_path / "alone") for arg in argv[3:]]
    main(["train", "--recipe", f"{file}/one", *alone, "--init_student_from", str(out / "two")])
    same_tensors(out / "one", tmp_path / "alone")

    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    for folder in ("all", "1-step"):
        pipe.load_lora_weights(out / "loras" / folder, adapter_name=folder)
    weights = {
        folder: [p for n, p in pipe.unet.named_parameters() if f".{folder}." in n and "lora_B" in n]
        for folder in ("all", "1-step")
    }
    assert all(any(p.abs().max() > 0 for p in tensors) for tensors in weights.values())
    one, other = (torch.cat([p.flatten() for p in tensors]) for tensors in weights.values())
    assert not torch.equal(one, other)
    StableDiffusionPipeline.from_pretrained(out / "pipeline")

    other = ["train", "--recipe", file, *argv[3:], "--learning_rate", "0.5"]
    with pytest.raises(SystemExit, match=r"begun with, got another learning_rate: 0.5 in place"):
        main(other)


@pytest.mark.full
def test_pairs_are_made_of_the_model_that_learns_them(tmp_path, tmp_path_factory) -> None:
    """Straightened, then one step on its own new pairs, as InstaFlow; the third shares them."""
    teacher, out = teacher_dir("sd_v", tmp_path_factory), tmp_path / "out"
    pairs = {"num_pairs": 3, "num_steps": 2}
    reflow, distill = ({"method": "reflow", "method_config": {"stage": s}} for s in
                       ("reflow", "distill"))  # fmt: skip
    file = recipe(
        tmp_path,
        "prompts",
        {
            "straight": part(pairs=pairs, options={**reflow, "tuning": {"student": "full"}}),
            "one": part(pairs=pairs, model_of="straight", options=distill),
            "again": part(pairs="one", model_of="straight", student_of="one", options=distill),
        },
        **SMALL,
    )
    main(["train", "--recipe", file, *flags(teacher, out, prompts(tmp_path))])
    made = [sorted((out / name / "pairs").glob("**/*.safetensors")) for name in ("straight", "one")]
    assert [len(files) for files in made] == [1, 1]
    assert made[0][0].read_bytes() != made[1][0].read_bytes()
    assert not (out / "again" / "pairs").exists()
    assert not (out / "one" / "pipeline").exists()  # nobody asked for it
    StableDiffusionPipeline.from_pretrained(out / "pipeline")


def test_seconds_are_shared_out(tmp_path, tmp_path_factory) -> None:
    teacher, file = teacher_dir("sd_v", tmp_path_factory), segments(tmp_path)
    argv = ["--recipe", file, *flags(teacher, tmp_path / "out", images(tmp_path))]
    several = parse_trainings([*argv, "--max_train_seconds", "30"], "stepdistill train")
    assert several is not None
    assert several.given.max_train_seconds == 30
    assert several.run("two").max_train_seconds == 10


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--init_student_from", "x"], "expected no init_student_from, as its trainings"),
        (["--resume_from_checkpoint", "checkpoint-1"], "expected resume_from_checkpoint none or"),
        (["--learning_rats", "1"], "Nearest"),
    ],
)
def test_mistakes_are_told_before_weights(
    more, said, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher, file = teacher_dir("sd_v", tmp_path_factory), segments(tmp_path)
    if more[0] == "--init_student_from":
        more = ["--init_student_from", str(teacher)]
    elif more[1] == "checkpoint-1":
        (tmp_path / "checkpoint-1").mkdir()
        more = [more[0], str(tmp_path / "checkpoint-1")]
    argv = [*flags(teacher, tmp_path / "out", images(tmp_path)), *more]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", file, *argv])
    assert said in str(stop.value)
    assert "\n" not in str(stop.value).strip()
    assert not (tmp_path / "out").exists()


def test_pairs_need_prompts(tmp_path, tmp_path_factory, no_loading) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    argv = ["train", "--recipe", "sd15-instaflow", *flags(teacher, tmp_path / "out", [])]
    with pytest.raises(SystemExit, match=r"expected --data\.prompts_file, of which it makes"):
        main([*argv, *images(tmp_path)])


@pytest.mark.full  # each of its trainings runs by tests/config/test_recipe_files.py, too
@pytest.mark.parametrize("name", several_trainings())
def test_a_bundled_one_on_a_tiny_model(name, tmp_path, tmp_path_factory, monkeypatch) -> None:
    def judge(images: torch.Tensor, by: Any) -> torch.Tensor:
        other = by if isinstance(by, torch.Tensor) else 0.0
        return (images - other).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr("stepdistill.training.checks.check_scorers", lambda *_: None)
    monkeypatch.setattr(
        "stepdistill.training.trainer.build_scorers", lambda specs, *_: dict.fromkeys(specs, judge)
    )
    about, out = several_trainings()[name], tmp_path / "out"

    def few(*args: Any, **options: Any) -> Path:
        return make_pairs(*args, **{**options, "num_pairs": 2, "num_steps": 2})

    monkeypatch.setattr("stepdistill.cli._trainings.make_pairs", few)
    teacher = teacher_dir(about.family, tmp_path_factory)
    data = images(tmp_path) if about.data in ("images", "lowres") else prompts(tmp_path)
    argv = ["train", "--recipe", name, *flags(teacher, out, data), "--decoder", "null"]
    argv += ["--train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    main([*argv, "--mixed_precision", "no", "--tuning.rank", "2", "--tuning.alpha", "2"])
    for training in about.trainings.values():
        for folder in training.lora:
            assert (out / "loras" / folder / "pytorch_lora_weights.safetensors").is_file()
    assert (out / "pipeline" / "model_index.json").is_file()
