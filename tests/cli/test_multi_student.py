"""Several students on shares of the prompts: shares, runs, resume, and the routed pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support.resume import same_tensors
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.config.files import parse_run_config
from stepdistill.core.solvers import sample_x0
from stepdistill.trainers import DistillationTrainer, ended_run, trainer_of_run

PROMPTS = ["a cat", "a dog", "a red car", "two blue boats", "a house", "the sea at night", "a cat"]
LABELS = [0, 1, 2, 3, 4, 5, 0]


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path_factory, monkeypatch) -> None:
    """Diffusers copies a pipeline's file to a cache; parallel tests must not share it."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def options(family: str, out: Path, factory: Any) -> list[str]:
    return [
        *("--method", "dmd2", "--output_dir", str(out), "--max_train_steps", "2"),
        *("--pretrained_model_name_or_path", str(teacher_dir(family, factory))),
        *("--method_config.num_steps", "1", "--method_config.critic_steps", "1"),
        *("--learning_rate", "0.1", "--tuning.rank", "2", "--tuning.student", "lora"),
        *("--checkpointing_steps", "1", "--validation_steps", "0", "--disable_progress_bar"),
    ]


def call(command: str, family: str, out: Path, factory: Any, *more: str) -> None:
    rows = out.parent / f"{family}.txt"
    rows.write_text("".join(f"{row}\n" for row in (LABELS if family == "dit" else PROMPTS)))
    main([command, *options(family, out, factory), "--data.prompts_file", str(rows), *more])


_DONE: dict[str, Path] = {}
_TRAINED: list[str] = []  # of the run that was cut off


def three(family: str, factory: Any) -> Path:
    """A finished run of three students, made once a test process; `sd` was cut off in the second
    one's middle, and gone on with."""
    if family not in _DONE:
        out, train = factory.mktemp("msd") / family, DistillationTrainer.train

        def cut_off(self: Any, until: int | None = None) -> Any:
            _TRAINED.append(self.output_dir.name)
            if _TRAINED.count("student-1") == 1 and self.output_dir.name == "student-1":
                train(self, until=1)
                raise SystemExit(75)
            return train(self, until)

        with pytest.MonkeyPatch.context() as patch:
            if family == "sd":
                patch.setattr(DistillationTrainer, "train", cut_off)
                with pytest.raises(SystemExit, match="75"):
                    call("multi_student", family, out, factory, "--num_students", "3")
                assert not (out / "student-2").exists()
            call("multi_student", family, out, factory, "--num_students", "3")
        _DONE[family] = out
    return _DONE[family]


def stock(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, subject: Any, seed: int = 0, **more: Any) -> torch.Tensor:
    """(B, C, H, W); an image of each prompt from noise of its own seed."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(subject))]
    return torch.as_tensor(pipe(subject, generator=generators, output_type="pt", **more).images)


def shares(out: Path) -> list[list[str]]:
    return [(out / f"prompts-{k}.txt").read_text().splitlines() for k in range(3)]


def subjects(family: str, rows: list[str]) -> list[Any]:
    return [int(row) for row in rows] if family == "dit" else rows


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", pytest.param("dit", marks=pytest.mark.full)])
def test_shares_are_equal_and_hold_every_line(family, tmp_path_factory) -> None:
    parts = shares(three(family, tmp_path_factory))
    assert [len(set(part)) for part in parts] == [2, 2, 2]
    rows = LABELS if family == "dit" else PROMPTS
    assert sorted(row for part in parts for row in part) == sorted(map(str, rows))


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", pytest.param("dit", marks=pytest.mark.full)])
def test_stock_diffusers_gives_each_prompt_its_students_image(family, tmp_path_factory) -> None:
    out = three(family, tmp_path_factory)
    pipe = stock(out / "pipeline")
    for number, rows in enumerate(shares(out)):
        assert pipe.students_of(subjects(family, rows)) == [number] * len(rows)
        trainer = trainer_of_run(out / f"student-{number}")
        student, shape = trainer.family, trainer.family.sample_shape()
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        subject = subjects(family, rows)[:1]
        with torch.no_grad():
            latents = sample_x0(
                trainer.student(), trainer.method.sampler(), noise, student.encode(subject)
            )
            ours = (student.images(latents) / 2 + 0.5).clamp(0, 1)
        theirs = made(pipe, subject)
        theirs = theirs.permute(0, 3, 1, 2) if theirs.shape[-1] == 3 else theirs
        assert float((ours - theirs).abs().max()) < 1e-4, number
        others = (made(pipe, subject, student=k) for k in range(3) if k != number)
        assert all(float((made(pipe, subject) - each).abs().max()) > 1e-3 for each in others)


@pytest.mark.full
def test_prompts_of_several_students_in_one_call(tmp_path_factory) -> None:
    pipe = stock(three("sd", tmp_path_factory) / "pipeline")
    rows = PROMPTS[:6]
    together = made(pipe, rows)
    alone = torch.cat([made(pipe, [row], seed=i) for i, row in enumerate(rows)])
    assert torch.allclose(together, alone, atol=1e-5)
    arrays = pipe(rows[:4], num_images_per_prompt=2, output_type="np", return_dict=False)[0]
    assert arrays.shape[0] == 8


@pytest.mark.full
def test_saved_again_it_is_the_same(tmp_path, tmp_path_factory) -> None:
    pipe = stock(three("sd", tmp_path_factory) / "pipeline")
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(made(stock(tmp_path / "again"), PROMPTS[:2]), made(pipe, PROMPTS[:2]))


@pytest.mark.full
def test_sample_runs_it_and_the_card_says_so(tmp_path, tmp_path_factory, capsys) -> None:
    folder = three("sd", tmp_path_factory) / "pipeline"
    main(["sample", str(folder), "--prompt", "a cat", "--output_dir", str(tmp_path / "s")])
    assert (tmp_path / "s" / "0000.png").is_file()
    card = (folder / "README.md").read_text()
    assert "| students | 3, one a call, by the prompt's text |" in card
    assert "trust_remote_code=True" in card
    main(["push", str(folder), "me/x", "--dry_run", str(tmp_path / "dry")])
    assert (tmp_path / "dry" / "students" / "multi_student.py").is_file()


@pytest.mark.full
def test_a_student_cut_off_is_the_plain_run_on_its_share(tmp_path, tmp_path_factory) -> None:
    out = three("sd", tmp_path_factory)
    assert _TRAINED == ["student-0", "student-1", "student-1", "student-2"]
    same_tensors(
        out / "student-1", plain(tmp_path / "base", out / "prompts-1.txt", tmp_path_factory)
    )


@pytest.mark.full  # by default the student that is cut off is compared with a plain run
def test_one_student_is_the_method(tmp_path, tmp_path_factory) -> None:
    call("multi_student", "sd", tmp_path / "one", tmp_path_factory, "--num_students", "1")
    base = plain(tmp_path / "base", tmp_path / "sd.txt", tmp_path_factory)
    same_tensors(tmp_path / "one" / "student-0", base)
    assert stock(tmp_path / "one" / "pipeline").students_of(PROMPTS) == [0] * 7


def plain(out: Path, prompts: Path, factory: Any) -> Path:
    """The folder of `stepdistill train` on these prompts, without its export."""
    argv = [*options("sd", out, factory), "--data.prompts_file", str(prompts)]
    ended_run(parse_run_config(argv, by_size=True))
    return out


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("sd", ["--num_students", "0"], "num_students"),
        ("sd", ["--num_students", "7"], "at most one for each of 6 different prompts"),
        ("sd", ["--num_students", "2", "--tuning.student", "full"], "--tuning.student lora"),
        ("sd", ["--num_students", "2", "--resume_from_checkpoint", "x"], "none or latest"),
        ("unet2d", ["--num_students", "2"], "unconditional"),
        ("wan_experts", ["--num_students", "2"], "of two experts"),
    ],
)
def test_mistakes_are_told_before_weights(
    family, more, said, tmp_path, tmp_path_factory, no_loading
) -> None:
    with pytest.raises(SystemExit) as stop:
        call("multi_student", family, tmp_path / "run", tmp_path_factory, *more)
    assert said in str(stop.value)
    assert "\n" not in str(stop.value).strip()


@pytest.mark.full
def test_other_options_in_a_begun_folder_are_refused(tmp_path_factory) -> None:
    out = three("sd", tmp_path_factory)
    more = ["--num_students", "3", "--learning_rate", "0.2"]
    with pytest.raises(SystemExit, match="another learning_rate"):
        call("multi_student", "sd", out, tmp_path_factory, *more)
    record = json.loads((out / "multi_student.json").read_text())
    assert record["sizes"] == [2, 2, 2]
