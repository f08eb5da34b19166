"""Optimise images, latents or a voxel scene of a prompt by score gradients (SDS, VSD, ...).

    stepdistill particles --gradients sds:100 vsd:7.5

Without a teacher: the demo's digits, with Frechet distance and recall. stepdistill/particles/ has
the page, and the class for a renderer of yours.
"""

from __future__ import annotations

from stepdistill.particles.options import ParticleOptions as Options


def run(options: Options) -> None:
    from stepdistill.cli._particles import run_particles

    print(f"report: {run_particles(options)}")
