"""Stand-alone script: samples exported pipelines with nothing but Diffusers.

    python fresh_sampler.py request.json

It is run in a process of its own by `reload.sample_in_fresh_process` and imports nothing of this
package, which it checks at the end: whatever it can draw, any Diffusers user can draw. The request
holds prompts, seeds, threads and jobs, each with folder, num_inference_steps, guidance_scale and
output (.npz).
"""

import json
import sys
import time
from typing import Any

sys.path.pop(0)  # the script's own folder: its neighbours must not be importable

import diffusers
import numpy as np
import torch


def sample(job: dict[str, Any], prompts: list[str], seeds: list[int]) -> None:
    """Writes images (S, N, H, W, C) in [0, 1], seconds for each seed and calls for each image."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(job["folder"], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    rows = 0

    def count(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    pipeline.unet.register_forward_pre_hook(count)
    images, seconds = [], []
    for seed in seeds:
        start = time.perf_counter()
        made = pipeline(
            prompts,
            num_inference_steps=job["num_inference_steps"],
            guidance_scale=job["guidance_scale"],
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        seconds.append(time.perf_counter() - start)
        images.append(made.images)
    np.savez(
        job["output"],
        images=np.stack(images).astype(np.float32),
        seconds=np.array(seconds),
        network_calls=rows / (len(seeds) * len(prompts)),
        pipeline_class=type(pipeline).__name__,
        scheduler_class=type(pipeline.scheduler).__name__,
    )


def main(request_path: str) -> None:
    """Runs the jobs of a request file. Errors: exit status 1 if this package was imported."""
    with open(request_path) as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    for job in request["jobs"]:
        sample(job, request["prompts"], request["seeds"])
    foreign = [name for name in sys.modules if name.split(".")[0] == "stepdistill"]
    if foreign:
        raise SystemExit(f"expected Diffusers alone, but these were imported: {foreign}")


if __name__ == "__main__":
    main(sys.argv[1])
