"""What a run says first and last: five lines, and the command that tries its result."""

from __future__ import annotations

import html
import shlex
from typing import Any

import pytest
import torch
from support.runs import teacher_dir

from stepdistill.cli import main
from stepdistill.config.files import method_class, method_config, parse_run_config
from stepdistill.config.run import RunConfig
from stepdistill.planning.blueprint import blueprint
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny import TINY
from stepdistill.training.opening import memory_line, method_line, teacher_line, trained_line
from stepdistill.training.setup import roles_of


def test_a_run_says_what_it_does_and_how_to_try_it(tmp_path, tmp_path_factory, capsys) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    out = tmp_path / "my run"
    command = (
        f"train --method dmd2 --pretrained_model_name_or_path {teacher} --max_train_steps 1 "
        f"--data.prompts_file {tmp_path / 'prompts.txt'} --train_batch_size 2 "
        "--gradient_accumulation_steps 1 --max_train_seconds 900 --disable_progress_bar"
    )
    main([*command.split(), "--output_dir", str(out)])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    count = sum(p.numel() for p in TINY["sd"]().unet.parameters())
    assert lines[0].startswith(
        f"teacher: {teacher}, StableDiffusionPipeline of {count / 1e6:.2g} M"
    )
    assert lines[1].startswith(
        "method:  dmd2 (Yin et al. 2024, arXiv:2405.14867) for 4 steps, guid"
    )
    assert "2 samples an update, learning rates student 0.0001, fake 0.0006" in lines[1]
    assert "flags max_train_steps, train_batch_size" in lines[1]
    assert "; recipe small-dmd2, as the denoiser has" in lines[1]
    assert lines[2].startswith(f"trained: student (full, {count / 1e6:.2g} M parameters), fake (")
    assert lines[2].endswith("; 1 step or 900 s, whichever comes first")
    assert lines[3].startswith("memory:  1.1 MiB of weights held; forecast 2.3 MiB with gradients")
    assert lines[4] == f"report:  {out / 'report.html'}, written while it runs"
    assert "recipe" not in said.err  # once is enough
    page = html.unescape((out / "report.html").read_text())
    assert f"stepdistill sample {shlex.quote(str(out / 'pipeline'))}" in page
    name, last = lines[-1].split(": ", 1)
    assert name == "try it"
    main([*shlex.split(last)[1:], "--output_dir", str(tmp_path / "samples")])
    assert (tmp_path / "samples" / "0000.png").is_file()


def lines_of(recipe: str, model: str) -> list[str]:
    """The first four lines of a recipe's run on a model's real shapes, without its weights."""
    run: RunConfig = parse_run_config(
        ["--recipe", recipe, "--pretrained_model_name_or_path", model]
    )
    family = blueprint(model, run.frozen_dtype)
    config = method_config(run.method, run.method_config)
    method: Any = method_class(run.method)(config, family.setting_at(run.resolution))
    with torch.device("meta"):
        bank = RoleBank(family, roles_of(method, run), run.tuning)
    lines = [
        teacher_line(model, bank, run.resolution),
        method_line(method, run, 1, run.reasons),
        trained_line(bank, run),
        memory_line(bank, method, run, 24 << 30),
    ]
    print("\n".join(lines))
    return lines


@pytest.mark.full
def test_first_lines_on_sdxl_s_shapes() -> None:
    lines = lines_of("sdxl-dmd2-lora-4step", "sdxl")
    assert "StableDiffusionXLPipeline of 2.6 B parameters at 1024 x 1024 px" in lines[0]
    assert "guidance 8" in lines[1]
    assert "from recipe sdxl-dmd2-lora-4step" in lines[1]
    assert "student (LoRA of rank 64, " in lines[2]
    assert lines[3].endswith("autoencoder on the CPU, 1.8 GiB; the device has 24.0 GiB")


@pytest.mark.full
def test_first_lines_on_flux_s_shapes() -> None:
    lines = lines_of("flux-dmd2-lora", "flux")
    assert "FluxPipeline of 11.9 B parameters at 1024 x 1024 px, predicts flow" in lines[0]
    assert "guidance 3.5" in lines[1]
    assert lines[3].endswith(
        "MORE than the device's 24.0 GiB: stepdistill plan says what saves most"
    )


@pytest.mark.full
def test_memory_is_held_against_the_device_that_holds_it(tmp_path_factory) -> None:
    """Not what is said to lie on the CPU."""
    teacher = str(teacher_dir("sd", tmp_path_factory))
    told = ["--method", "dmd2", "--pretrained_model_name_or_path", teacher]
    texts = {}
    for name, flags in (("all", []), ("offloaded", ["--offload_encoders"])):
        run = parse_run_config([*told, *flags])
        family = blueprint(teacher, torch.float32)
        method: Any = method_class("dmd2")(method_config("dmd2", {}), family.setting)
        with torch.device("meta"):
            bank = RoleBank(family, roles_of(method, run), run.tuning)
        texts[name] = memory_line(bank, method, run, 1 << 20)
    assert texts["all"].endswith(
        "; MORE than the device's 1.0 MiB: stepdistill plan says what saves most"
    )
    assert "autoencoder on the CPU" not in texts["all"]
    held = {name: float(text.split()[1]) for name, text in texts.items()}
    assert "autoencoder on the CPU" in texts["offloaded"]
    assert held["offloaded"] != held["all"]  # in KiB and MiB
