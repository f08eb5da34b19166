"""Reloads exported pipelines in a fresh Python process that knows only Diffusers."""

# N images, S noise seeds

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepdistill.evaluation.samples import Samples

SCRIPT = Path(__file__).with_name("fresh_sampler.py")


@dataclass(frozen=True)
class Job:
    """An exported pipeline and how to call it; guidance_scale 1 means none."""

    folder: Path
    num_inference_steps: int
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class FreshSamples:
    """Samples of each seed, and the classes that the stock loader chose."""

    samples: list[Samples]
    pipeline_class: str
    scheduler_class: str


def sample_in_fresh_process(
    jobs: Sequence[Job], prompts: Sequence[str], seeds: Sequence[int], threads: int = 1
) -> list[FreshSamples]:
    """What each exported pipeline draws for the prompts, made outside this process.

    Args:   threads: torch's in the new process.
    Errors: ValueError for a folder that is no pipeline; RuntimeError with the process's last lines
            where it fails, which it also does if anything imports stepdistill there.
    """
    for job in jobs:
        if not (job.folder / "model_index.json").is_file():
            raise ValueError(
                f"reload: expected a saved pipeline, got {job.folder} without model_index.json. "
                "Export the student first."
            )
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / f"{index}.npz" for index in range(len(jobs))]
        request = {
            "prompts": list(prompts),
            "seeds": list(seeds),
            "threads": threads,
            "jobs": [
                {
                    "folder": str(job.folder.resolve()),
                    "num_inference_steps": job.num_inference_steps,
                    "guidance_scale": job.guidance_scale,
                    "output": str(output),
                }
                for job, output in zip(jobs, outputs, strict=True)
            ],
        }
        _run(request, Path(scratch))
        return [_read(output) for output in outputs]


def _run(request: dict[str, object], scratch: Path) -> None:
    request_file = scratch / "request.json"
    request_file.write_text(json.dumps(request))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), str(request_file)],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        lines = "\n".join(finished.stderr.strip().splitlines()[-8:])
        raise RuntimeError(
            "reload: expected the export to load and sample with Diffusers alone, but the process "
            f"ended with status {finished.returncode}:\n{lines}"
        )


def _read(output: Path) -> FreshSamples:
    with np.load(output) as made:
        images = torch.from_numpy(made["images"]).permute(0, 1, 4, 2, 3) * 2 - 1
        calls = float(made["network_calls"])
        samples = [
            Samples(one, float(seconds), calls)
            for one, seconds in zip(images, made["seconds"], strict=True)
        ]
        return FreshSamples(samples, str(made["pipeline_class"]), str(made["scheduler_class"]))
