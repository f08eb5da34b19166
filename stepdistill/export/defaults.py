"""What a stock call must be told: its class's own defaults serve wherever they can be made to.

Guidance: some pipelines read from a config whether guidance_scale counts; `Family.settle_guidance`.
Steps: no scheduler's config fixes the number of calls; it is a default of the pipeline class. So a
student goes into another stock class of the same parts where that one's defaults are its own. What
is left stands in distillation.json under `typed`, on the card, and in `load_pipeline`'s defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from stepdistill.export.card import call_options
from stepdistill.families.family import Family


def settle(family: Family, pipeline: Any, record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(pipeline, options that its call must still be told) with as few of the latter as can be.

    Args: pipeline: a copy of the family's with the student in it; record: see `describe`.
    """
    options = call_options(record)
    default, wanted = _defaults(type(pipeline)).get("guidance_scale"), options.get("guidance_scale")
    if wanted not in (None, default) and not record["guided"]:  # None: no such argument
        settled = family.settle_guidance(pipeline, wanted)
        options = {k: v for k, v in options.items() if not (settled and k == "guidance_scale")}
    best = type(pipeline)
    for name in family.short_pipelines:
        cls = getattr(diffusers, name)
        if _serves(cls, pipeline, options) and len(_typed(cls, options)) < len(
            _typed(best, options)
        ):
            best = cls
    if best is not type(pipeline):
        taken = inspect.signature(best.__init__).parameters
        parts = {name: part for name, part in pipeline.components.items() if name in taken}
        pipeline = best(**parts, requires_safety_checker=False)
    return pipeline, _typed(best, options)


def _defaults(cls: type) -> dict[str, Any]:
    call = inspect.signature(cls.__call__).parameters  # type: ignore[operator]
    return {name: entry.default for name, entry in call.items()}


def _typed(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the defaults of the class's call."""
    defaults = _defaults(cls)
    return {name: value for name, value in options.items() if defaults.get(name) != value}


def _serves(cls: type, pipeline: Any, options: Mapping[str, Any]) -> bool:
    """Whether that class's call takes the options, and the scheduler and network its loop."""
    told_w = pipeline.unet.config.time_cond_proj_dim is not None
    takes = inspect.signature(pipeline.scheduler.set_timesteps).parameters
    return told_w and "original_inference_steps" in takes and set(options) <= set(_defaults(cls))
