"""What guidance distillation into a LoRA costs and keeps, beside a full student. Prints tables.

    pytest -m benchmark -n 0 -s tests/benchmarks/test_guidance.py

(a) Resident weights, gradients and optimiser state on the real SDXL UNet config (meta device).
(b) Measured peak of two training steps, each in a process of its own, on a 210 M-parameter UNet.
(c) On the digits' teacher, trained here: network calls of an image, and how near the student's
    images are to the guided teacher's from the same noise, as a share of what guidance changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.test_cost import _MetaSDXL, resident_bytes, show
from diffusers import DiffusionPipeline

from stepdistill import LoRADistillationTrainer, TrainConfig, Tuning
from stepdistill.data.images import ImageFolderDataset
from stepdistill.demo.data import load_digit_splits, write_image_folder
from stepdistill.demo.teacher import TeacherConfig, load_or_train_teacher, quiet_loading
from stepdistill.evaluation.samples import PipelineSampler, Samples
from stepdistill.methods.lora_guidance import LoRAGuidance, LoRAGuidanceConfig

pytestmark = pytest.mark.benchmark

GIB = 2**30
GUIDANCE, STEPS = 3.0, 16


def test_resident_bytes_on_sdxl() -> None:
    """(a)"""
    roles = LoRAGuidance(LoRAGuidanceConfig(), _MetaSDXL().setting).roles()
    lora = sum(resident_bytes(Tuning(student="lora", rank=64), roles).values())
    full = sum(resident_bytes(Tuning(student="full"), roles).values())
    show(
        "(a) lora_guidance on the SDXL UNet: LoRA r=64 against a full student and its teacher",
        [
            ("resident", f"{lora / GIB:.2f} / {full / GIB:.2f} GiB"),
            ("ratio", f"{lora / full:.3f}"),
        ],
    )
    assert lora <= 0.5 * full


def test_measured_peak(tmp_path) -> None:
    """(b)"""
    script = Path(__file__).parents[1] / "support" / "peak_memory.py"
    peak = {}
    for layout in ("lora", "full"):
        (tmp_path / layout).mkdir()
        done = subprocess.run(
            [sys.executable, str(script), layout, str(tmp_path / layout)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            check=True,
        )
        peak[layout] = json.loads(done.stdout.splitlines()[-1])["peak"]
    ratio = peak["lora"] / peak["full"]
    show(
        "(b) measured peak of two updates, 210 M parameters in float32, batch 1",
        [
            ("peak", f"{peak['lora'] / GIB:.2f} / {peak['full'] / GIB:.2f} GiB"),
            ("ratio", f"{ratio:.3f}"),
        ],
    )
    assert ratio <= 0.5


def test_half_the_calls_make_the_guided_images(tmp_path) -> None:
    """(c)"""
    torch.set_num_threads(1)
    quiet_loading()
    digits = load_digit_splits()
    kept = Path(os.environ.get("STEPDISTILL_QUALITY_DIR", tmp_path))
    folder = load_or_train_teacher(TeacherConfig(), digits.train, kept / "teacher").folder
    write_image_folder(digits.train, tmp_path / "data")
    trainer = LoRADistillationTrainer(
        folder,
        TrainConfig(
            output_dir=str(tmp_path / "run"),
            max_train_steps=400,
            train_batch_size=64,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            adam_beta2=0.99,
            adam_weight_decay=0.0,
            max_grad_norm=100.0,
            ema_decay=0.98,
            checkpointing_steps=0,
            disable_progress_bar=True,
            tuning=Tuning(student="lora", rank=16),
        ),
        ImageFolderDataset(tmp_path / "data", None),
        method_config={"guidance": GUIDANCE, "teacher_steps": STEPS},
    )
    trainer.train()
    teacher = DiffusionPipeline.from_pretrained(str(folder))
    student = DiffusionPipeline.from_pretrained(str(trainer.export(tmp_path / "out")))
    prompts = digits.heldout.prompts

    def sample(pipeline: DiffusionPipeline, guidance: float) -> Samples:
        call = {"num_inference_steps": STEPS, "guidance_scale": guidance}
        return PipelineSampler(pipeline, call)(prompts, 0)

    guided = sample(teacher, GUIDANCE)
    plain = sample(teacher, 1)
    made = sample(student, 1)
    error = _rms(made.images, guided.images) / _rms(plain.images, guided.images)
    show(
        f"(c) guided teacher (g = {GUIDANCE:g}) against its LoRA student, {STEPS} steps",
        [
            ("network calls", f"{guided.network_calls:g} / {made.network_calls:g}"),
            ("image difference / what guidance changes", f"{error:.3f}"),
        ],
    )
    assert made.network_calls == guided.network_calls / 2
    assert error < 0.5


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())
