"""Tell versions, devices, launcher and a self-check, to paste into a bug; status 1 if it fails."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from stepdistill.config.flags import CommandOptions, parse_options

PACKAGES = (
    *("stepdistill", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"),
    *("huggingface_hub", "numpy"),
)
# The only variables that are shown: none of them holds a secret, a name or a path.
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
VARIABLES = (
    *LAUNCHER,
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"),
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND", "NCCL_DEBUG", "NCCL_P2P_DISABLE"),
    *("NCCL_IB_DISABLE", "SLURM_NTASKS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"),
)
GB = 1e9


class Options(CommandOptions):
    format: Literal["markdown", "json"] = "markdown"
    """How it is printed; --json for short."""
    self_check: bool = True
    """Train a tiny model one step, export it and load it again, on the CPU and each CUDA device."""


def parse(argv: Sequence[str], prog: str) -> Options:
    """The options, --json among them (a field of that name would hide pydantic's own)."""
    spelled = [
        part for arg in argv for part in (("--format", "json") if arg == "--json" else (arg,))
    ]
    return parse_options(Options, spelled, prog, str(__doc__))


def run(options: Options) -> int:
    facts = report(options.self_check)
    print(json.dumps(facts, indent=2) if options.format == "json" else markdown(facts))
    checks = facts["self-check"].values()
    return int(any(not value.startswith("passed") for value in checks))


def report(self_check: bool = True) -> dict[str, dict[str, str]]:
    """Section -> fact -> value, without a secret, a path of the user's or the machine's name."""
    return {
        "versions": versions(),
        "devices": devices(),
        "launcher": {k: os.environ[k] for k in VARIABLES if k in os.environ} or {"none": "-"},
        "disk": disk(),
        "extras": extras(),
        "self-check": {name: checked(name) for name in device_names()} if self_check else {},
    }


def markdown(sections: dict[str, dict[str, str]]) -> str:
    """The report as lists under headings."""
    lines = ["## stepdistill doctor"]
    for section, facts in sections.items():
        lines += ["", f"### {section}", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import torch

    installed = {dist.name.lower().replace("-", "_") for dist in metadata.distributions()}
    lines = {"python": platform.python_version(), "system": platform.platform()}
    lines |= {n: metadata.version(n) if n in installed else "missing" for n in PACKAGES}
    return {**lines, "CUDA of torch": str(torch.version.cuda), "NVIDIA driver": driver()}


def driver() -> str:
    """The NVIDIA driver's version, or none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.split() or ["nvidia-smi failed"])[0]


def devices() -> dict[str, str]:
    import torch

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    threads = torch.get_num_threads()
    lines = {"cpu": f"{os.cpu_count()} cores, {threads} threads, {free:.1f} of {total:.1f} GB free"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        left, size = (value / GB for value in torch.cuda.mem_get_info(index))
        kind = f"{facts.name}, capability {facts.major}.{facts.minor}"
        lines[f"cuda:{index}"] = f"{kind}, {left:.1f} of {size:.1f} GB free"
    if torch.backends.mps.is_available():
        lines["mps"] = "available"
    return lines


def disk() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"Hub cache": HF_HUB_CACHE, "temporary files": tempfile.gettempdir()}
    free = {}
    for name, folder in folders.items():
        here = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        size = shutil.disk_usage(here)
        there = "" if here == Path(folder) else " (not made yet)"
        free[name] = f"{size.free / GB:.1f} of {size.total / GB:.1f} GB free{there}"
    return free


def extras() -> dict[str, str]:
    """Each extra of the package: installed, or what is missing of it."""
    from packaging.requirements import Requirement

    installed = {dist.name.lower().replace("_", "-") for dist in metadata.distributions()}
    lines = {}
    required = [Requirement(line) for line in metadata.requires("stepdistill") or ()]
    for extra in metadata.metadata("stepdistill").get_all("Provides-Extra") or ():
        needed = [r.name for r in required if r.marker and r.marker.evaluate({"extra": extra})]
        missing = [name for name in needed if name.lower().replace("_", "-") not in installed]
        lines[extra] = f"missing {', '.join(missing)}" if missing else "installed"
    return lines


def device_names() -> Iterator[str]:
    import torch

    yield "cpu"
    yield from (f"cuda:{index}" for index in range(torch.cuda.device_count()))


def checked(device: str) -> str:
    """What came of the self-check there, in a line."""
    started = time.monotonic()
    try:
        self_check(device)
    except Exception as err:
        return f"failed: {type(err).__name__}: {' '.join(str(err).split())[:400]}"
    return f"passed in {time.monotonic() - started:.1f} s"


def self_check(device: str) -> None:
    """One step of dmd2 on a tiny Stable Diffusion, exported, loaded and called.

    Errors: whatever fails; RuntimeError where the image has no values.
    """
    import torch
    from accelerate.state import AcceleratorState

    from stepdistill.config.run import TrainConfig
    from stepdistill.export.load import load_pipeline
    from stepdistill.testing.tiny import TINY
    from stepdistill.trainers import DistributionMatchingTrainer

    on_cuda = device != "cpu"
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        for name in LAUNCHER:  # this process checks alone, whoever launched it
            os.environ.pop(name, None)
        os.environ["ACCELERATE_USE_CPU"] = str(not on_cuda)
        AcceleratorState._reset_state(True)
        options: dict[str, Any] = {"max_train_steps": 1, "logging_steps": 1, "validation_steps": 0}
        TINY["sd"]().save_pretrained(f"{folder}/teacher")
        with torch.cuda.device(device if on_cuda else -1):
            trainer = DistributionMatchingTrainer(
                f"{folder}/teacher",
                TrainConfig(output_dir=f"{folder}/run", disable_progress_bar=True, **options),
                ["a photo of a cat"],
                method_config={"num_steps": 1, "critic_steps": 1},
            )
            trainer.train()
            if trainer.device.type != torch.device(device).type:
                raise RuntimeError(f"expected a run on {device}, got one on {trainer.device}.")
            trainer.export(f"{folder}/out")
            pipeline = load_pipeline(f"{folder}/out").to(device)
            image = pipeline("a photo of a cat", output_type="pt").images
        AcceleratorState._reset_state(True)
    if not bool(torch.isfinite(image).all()):
        raise RuntimeError("expected an image of finite values, got others.")
