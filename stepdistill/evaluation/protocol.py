"""What is told beside every number of an evaluation: how images were drawn, framed and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.families.registry import teacher_facts
from stepdistill.reporting.values import counted

from .metrics import MANIFOLD_IMAGES, Number, System
from .presets import preset
from .videos import frames_text

# What else a preset means where it names none of these: Options' own defaults
UNNAMED = {
    "num_images_per_prompt": 1,
    "num_reference": None,
    "size_px": None,
    "crop_px": None,
    "resize_filter": "lanczos",
}


def preset_text(
    options: Mapping[str, Any], networks: Sequence[str], reference: str, num_reference: int
) -> str | None:
    """The preset's name and what differs from it; None where there is no preset.

    Args: options: of the evaluation, resolved; networks: feature networks of the numbers that it
        is told of; reference: what these are against, "real" or "teacher"; num_reference: how
        many real images there are.
    """
    name = options["preset"]
    if name is None:
        return None
    preset_values = preset(name)
    values = {**UNNAMED, **preset_values.options}
    changed = [key for key in preset_values.options if options[key] != values[key]]
    changed += [
        key for key in UNNAMED if key not in preset_values.options and options[key] != values[key]
    ]
    if options["size_px"] is None and "size_px" not in changed:
        changed = [key for key in changed if key != "resize_filter"]  # nothing is resized
    wanted = values["num_reference"]
    few = wanted is not None and options["reference"] is not None and num_reference < wanted
    if few and "num_reference" not in changed:
        changed.append("num_reference")
    others = [network for network in networks if network != preset_values.features]
    if others:
        mixed = len(others) < len(networks)
        changed.append(f"features ({', '.join(others)})" if mixed else "features")
    if preset_values.real and reference != "real":
        changed.append("no reference" if options["reference"] is None else "reference")
    return f"{name}, changed: {', '.join(changed)}" if changed else name


def protocol_of(
    options: Any,
    facts: Mapping[str, Any],
    prompts: Sequence[Any],
    num_real: int,
    drawn: Mapping[str, str],
    frames: str | None,
) -> dict[str, Any]:
    """What stands beside every number of an evaluation.

    Args: facts: networks, frame and scorers; num_real: real images; drawn: see `measure`; frames:
        see Drawing.
    Notes: a guidance reaches a pipeline only where that has a null condition (see systems.py).
    """
    default = "none" if prompts[0] is None else "the pipeline's own"
    null = teacher_facts(options.source).has_null
    plain = f"{options.student_guidance:g}" if null else default
    given = options.model_dump()
    reference = "real" if num_real else "teacher"
    return {
        **facts,
        "num_prompts": len(prompts),
        "num_images_per_prompt": options.num_images_per_prompt,
        "num_reference": num_real or len(prompts) * options.num_images_per_prompt,
        "reference": options.reference
        or f"the teacher at {counted(max(options.teacher_steps), 'step')}",
        "seeds": list(options.seeds),
        "nearest_k": options.nearest_k,
        "manifold_images": MANIFOLD_IMAGES,
        "batch_size": drawn["batch_size"],
        "device": drawn["device"],
        "drawn_at": drawn["size"],
        "dtype": options.dtype,
        "guidance": options.guidance if null and options.guidance is not None else default,
        "student_guidance": f"the export's own; {plain} of other pipelines",
        "peak_memory_of": f"{drawn['peak_of']}, the metrics' networks among it",
        "preset": preset_text(given, list(facts["networks"]), reference, num_real),
        "frames": None if frames is None else frames_text(frames),
        "options": given,
    }


def images_text(facts: Mapping[str, Any], group: str, metric: str, network: str = "") -> str:
    """What a metric sees of the images of a system of that group.

    Real images are framed for all metrics, drawn ones for feature networks alone.
    """
    framed = group == "real" or (network and metric != "score")
    frame: str = facts["frame"] if framed else "as made"
    some = bool(network) or metric.startswith(("saturation", "contrast"))
    return f"{frame}; frames: {facts['frames']}" if facts["frames"] and some else frame


def reference_text(facts: Mapping[str, Any], reference: str) -> tuple[str, str]:
    """(how many images or videos, which) of the set that numbers are against; "": of none."""
    if reference == "real":
        return str(facts["num_reference"]), str(facts["reference"])
    if reference != "teacher":
        return "", ""
    count = facts["num_prompts"] * facts["num_images_per_prompt"]
    steps = max(facts["options"]["teacher_steps"])
    return str(count), f"the teacher at {counted(steps, 'step')}, guidance {facts['guidance']}"


def protocol_line(
    facts: Mapping[str, Any], quality: str, system: System, number: Number
) -> dict[str, str]:
    """The protocol of one number, flat, as a CSV's columns hold it.

    Args: facts: of `protocol_of` and more; quality: what the evaluation measures against, "real"
        or "teacher".
    """
    real, judged = system.group == "real", number.metric == "score"
    net = {} if judged else facts["networks"].get(number.network, {})
    nets = [number.network] if net else list(facts["networks"])
    count, which = reference_text(facts, "real" if real else number.reference)
    against = number.reference if net and number.reference else quality
    drawn = {
        "num_prompts": facts["num_prompts"],
        "num_images_per_prompt": facts["num_images_per_prompt"],
        "seeds": " ".join(map(str, facts["seeds"])),
        "guidance": facts["guidance" if system.group == "teacher" else "student_guidance"],
        "dtype": facts["dtype"],
        "batch_size": facts["batch_size"],
        "device": facts["device"],
    }
    return {
        "weights": facts["scorers"][number.network] if judged else net.get("weights", ""),
        "preprocess": net.get("preprocess", ""),
        "images": images_text(facts, system.group, number.metric, number.network),
        "num_reference": count,
        "reference_set": which,
        **{name: "" if real else str(value) for name, value in drawn.items()},
        "nearest_k": str(facts["nearest_k"]),
        "preset": preset_text(facts["options"], nets, against, facts["num_reference"]) or "",
        "versions": " ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
