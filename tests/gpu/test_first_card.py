"""What the first person with a card runs, in ten minutes: pytest -m gpu -n 0 tests/gpu

Everything that no CPU shows: kernels in half precision, compiled blocks, 4 and 8 bits, the
allocator. tests/training/test_device_checks.py runs the same checks on the CPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support.device_checks import fused_error, gradient_error, gradients, held_and_peak
from support.distributed import Job, alone, equal, seen_by
from support.distributed import gradient_error as role_error
from support.processes import LIMIT_S
from support.runs import teacher_dir

from stepdistill.config.run import RunConfig
from stepdistill.planning.blueprint import describe
from stepdistill.planning.forecast import _traced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Of a loss, and of the gradient's norm, against the CPU's float32: TF32 is off; half has 8 or 11
# bits of a mantissa, and a tiny network's outputs are sums of a few hundred products.
TOLERANCE = {"no": (1e-4, 1e-3), "bf16": (3e-2, 1e-1), "fp16": (1e-2, 3e-2)}


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd_v", "sd3", "flux"])
def test_an_update_is_the_cpus(family, layout, precision, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    loss, expected = gradients("cpu", "reflow", teacher, layout, tmp_path / "cpu")
    got, found = gradients(
        "cuda", "reflow", teacher, layout, tmp_path / "cuda", mixed_precision=precision
    )
    of_loss, of_gradient = TOLERANCE[precision]
    assert got == pytest.approx(loss, rel=of_loss)
    assert gradient_error(found, expected) < of_gradient


@pytest.mark.parametrize(
    ("option", "limit"), [({"compile": True}, 1e-3), ({"gradient_checkpointing": True}, 1e-5)]
)
def test_the_gradient_stays(option, limit, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    _, expected = gradients("cuda", "reflow", teacher, "lora", tmp_path / "plain")
    _, found = gradients("cuda", "reflow", teacher, "lora", tmp_path / "other", **option)
    assert gradient_error(found, expected) < limit


@pytest.mark.quantization
@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.2), ("nf4", 1.0)])
def test_a_quantised_base_trains(kind, limit, tmp_path, tmp_path_factory) -> None:
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    teacher, base = teacher_dir("flux", tmp_path_factory), {"rank": 2}
    options = {"mixed_precision": "bf16"}
    _, expected = gradients(
        "cuda", "reflow", teacher, "lora", tmp_path / "plain", tuning=base, **options
    )
    tuning = {**base, "base_quantization": kind}
    loss, found = gradients(
        "cuda", "reflow", teacher, "lora", tmp_path / kind, tuning=tuning, **options
    )
    assert loss == loss
    assert gradient_error(found, expected) < limit


def test_fused_adamw_is_the_plain_loop() -> None:
    assert fused_error("cuda") < 1e-6


def cut_flux(model: str) -> dict:
    """Flux at its true width with two blocks of 57, and T5 with two of 24."""
    told = copy.deepcopy(describe(model))
    told["parts"]["transformer"]["config"] |= {"num_layers": 1, "num_single_layers": 1}
    told["parts"]["text_encoder_2"]["config"] |= {"num_layers": 2}
    return told


@pytest.mark.parametrize("model", ["sd15", "sdxl", "flux"])
def test_the_allocators_peak_is_what_plan_says(model, tmp_path) -> None:
    run = RunConfig(
        pretrained_model_name_or_path=model,
        method="dmd2",
        method_config={"num_steps": 1, "critic_steps": 1},
        output_dir=str(tmp_path / "run"),
        mixed_precision="bf16",
        gradient_checkpointing=True,
        tuning={"rank": 16},
        train_batch_size=1,
        max_train_steps=2,
        disable_progress_bar=True,
    )
    _traced.cache_clear()
    read = cut_flux if model == "flux" else describe
    with patch("stepdistill.planning.blueprint.describe", read):
        held, peak, plan = held_and_peak("cuda", run)
    _traced.cache_clear()
    assert peak is not None
    assert held == pytest.approx(plan.resident, rel=0.02)
    assert plan.peak == pytest.approx(peak, rel=0.15)  # kernels' workspaces are nobody's tensors


TWO = """
import sys
from pathlib import Path
from support.distributed import Group, Job
teacher, out, wrapping = sys.argv[1:]
job = Job("dmd2_gan", "lora", wrapping, "dit")
Group(2, [job], {"dit": Path(teacher)}, Path(out), cpu=False).seen()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_two_cards_equal_one(wrapping, tmp_path: Path, tmp_path_factory) -> None:
    """In a process of their own: none can be forked from one that has used a card."""
    teacher, out = teacher_dir("dit", tmp_path_factory), tmp_path / "two"
    code = [sys.executable, "-c", TWO, str(teacher), str(out), wrapping]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(code, check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": paths})
    first, second = (seen_by(out, 0, rank) for rank in (0, 1))
    one = alone(Job("dmd2_gan", "lora", wrapping, "dit"), teacher, tmp_path / "one")
    assert equal(first, second), "ranks differ"
    assert first.facts["sharded"] == (wrapping == "fsdp2")
    assert role_error(one, first) < 1e-3
