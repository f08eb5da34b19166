"""What distillation costs, as ratios of two things measured in one run. Prints a table.

    pytest -m benchmark -n 0 -s tests/benchmarks

(a) One dmd2 iteration over the sum of its bare network forward and backward calls.
(b) Resident parameter + gradient + optimiser bytes: the shared layout over the full one, dmd2, on
    the real SDXL UNet config, on the meta device (nothing is allocated).
(c) Cached text embeddings and latents over encoding both at every step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from support.runs import build_trainer, teacher_dir

from stepdistill import DistributionMatchingTrainer, TrainConfig
from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.path import VPPath
from stepdistill.core.types import Cond
from stepdistill.demo.teacher import TeacherConfig, build_teacher
from stepdistill.families.sdxl import StableDiffusionXLFamily
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.batches import BatchMaker

pytestmark = pytest.mark.benchmark

# The architecture of stabilityai/stable-diffusion-xl-base-1.0's UNet: 2.567 B parameters.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table("what", "figure", title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def paired_ratio(ours: Callable[[], None], bare: Callable[[], None], rounds: int) -> list[float]:
    """Ratios ours / bare of neighbouring runs, so that drift of the machine cancels."""
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        bare()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return ratios


def test_iteration_over_bare_network_calls(tmp_path) -> None:
    """(a) on the demo's UNet (183k parameters) at batch 64, full roles."""
    torch.set_num_threads(1)
    build_teacher(TeacherConfig(), mean=0.0, std=0.5).save_pretrained(tmp_path / "teacher")
    trainer = DistributionMatchingTrainer(
        tmp_path / "teacher",
        TrainConfig(
            output_dir=str(tmp_path / "run"),
            train_batch_size=64,
            max_train_steps=10**6,
            tuning=Tuning(student="full", fake="full"),
            disable_progress_bar=True,
        ),
        ["a thing", "another"],
        method_config={"num_steps": 1, "critic_steps": 1, "guidance": 2.0},
    )
    bank, family, bsz = trainer.bank, trainer.family, 64
    batch = trainer.batches({"index": [0], "prompt": ["a"] * bsz})
    x, t = torch.randn(bsz, *batch.shape), torch.full((bsz,), 0.5, dtype=torch.float64)
    model_t = family.path.model_time(t)

    def forward(role: str, grad: bool, cond: Cond, x: torch.Tensor, mt: torch.Tensor) -> None:
        net = bank.nets[role if role in bank.nets else "base"]
        with torch.set_grad_enabled(grad):
            out = family.forward(net, x, mt, cond)
            if grad:
                out.square().mean().backward()

    def bare() -> None:
        # Student update: student with gradients, guided teacher (2B), fake. Fake update: itself.
        bank.train_only(("student",))
        forward("student", True, batch.cond, x, model_t)
        both = Cond.cat([batch.cond, batch.null])
        forward("teacher", False, both, torch.cat([x, x]), torch.cat([model_t, model_t]))
        forward("fake", False, batch.cond, x, model_t)
        bank.train_only(("fake",))
        forward("fake", True, batch.cond, x, model_t)
        for role in ("student", "fake"):
            for param in bank.members(role).values():
                param.grad = None

    trainer.feed.open(None, trainer.accelerator)

    def ours() -> None:
        carry: list[dict[str, object]] = [{}]
        for phase in trainer.method.phases(0):
            for repeat in range(phase.repeat):
                trainer._update(phase, repeat, carry)
        trainer.step += 1

    ours()
    bare()
    ratios = paired_ratio(ours, bare, 15)
    median = statistics.median(ratios)
    show(
        "(a) dmd2 iteration over its bare network calls (batch 64, one thread)",
        [("median ratio", f"{median:.3f}"), ("range", f"{min(ratios):.3f} - {max(ratios):.3f}")],
    )
    assert median <= 1.10


class _MetaSDXL(StableDiffusionXLFamily):
    """The SDXL family around its real denoiser on the meta device, and nothing else loaded."""

    def __init__(self) -> None:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SDXL_UNET).requires_grad_(False)
        scheduler = SimpleNamespace(config={})
        self.pipeline = SimpleNamespace(unet=unet, scheduler=scheduler)  # type: ignore[assignment]
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.path, self.kind, self._fixed_shift = VPPath.from_betas(betas), "eps", 1.0


def resident_bytes(tuning: Tuning, roles: dict[str, Role]) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW moments, the frozen base in bf16."""
    family = _MetaSDXL()
    with torch.device("meta"):  # adapters and copies too
        bank = RoleBank(family, roles, tuning)
    trained = {id(p) for r in bank.trained_roles for p in bank.members(r).values()}
    count = sum(p.numel() for p in bank.parameters() if id(p) in trained)
    frozen = sum(p.numel() for p in bank.parameters() if id(p) not in trained)
    return {
        "frozen (bf16)": 2 * frozen,
        "trained (fp32)": 4 * count,
        "gradients": 4 * count,
        "optimiser": 8 * count,
    }


def test_shared_layout_bytes_on_sdxl() -> None:
    """(b)"""
    roles = DMD2(DMD2Config(num_steps=4), _MetaSDXL().setting).roles()
    shared = resident_bytes(Tuning(student="lora", fake="lora", rank=64), roles)
    whole = resident_bytes(Tuning(student="full", fake="full"), roles)
    gib = 2**30
    rows = [(k, f"{shared[k] / gib:.2f} against {whole[k] / gib:.2f} GiB") for k in shared]
    ratio = sum(shared.values()) / sum(whole.values())
    show(
        "(b) dmd2 on the SDXL UNet: shared layout (LoRA r=64) against full",
        [
            *rows,
            ("total", f"{sum(shared.values()) / gib:.2f} / {sum(whole.values()) / gib:.2f} GiB"),
            ("ratio", f"{ratio:.3f}"),
        ],
    )
    assert ratio <= 0.15


def test_cached_encoding(tmp_path, tmp_path_factory) -> None:
    """(c)"""
    torch.set_num_threads(1)
    trainer = build_trainer("lcm", teacher_dir("sd_v", tmp_path_factory), "lora", tmp_path / "run")
    size = int(trainer.family.pipeline.vae.config.sample_size)
    raw = {
        "index": list(range(8)),
        "prompt": [f"prompt {i}" for i in range(8)],
        "image": torch.rand(8, 3, size, size) * 2 - 1,
    }
    device = torch.device("cpu")
    cached = BatchMaker(trainer.family, device)
    fresh = BatchMaker(trainer.family, device, cache_latents=False, max_cached_prompts=0)
    cached(raw)
    ratios = paired_ratio(lambda: cached(raw), lambda: fresh(raw), 15)
    median = statistics.median(ratios)
    show("(c) cached batch over encoding it", [("median ratio", f"{median:.4f}")])
    assert median < 0.5
