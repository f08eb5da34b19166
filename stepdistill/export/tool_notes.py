"""What a card says of ComfyUI and A1111: the file's place, and the numbers to set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.reporting.markdown import code

_LONG = "`--format kohya` (A1111, ComfyUI, sd-scripts) or `--format comfyui`"


def usage(record: Mapping[str, Any]) -> str:
    """The numbers in one line."""
    told = (record["tools"] or {}).get("comfyui")
    steps = f"{record['num_inference_steps']} steps"
    if told is None:
        return steps
    scheduler = told["scheduler"] or "ManualSigmas"
    return f"{steps}, sampler {told['sampler']}, scheduler {scheduler}, CFG {told['cfg']:g}"


def file_note(record: Mapping[str, Any]) -> str:
    """Which tool reads the file of a LoRA export whole, and where it is put."""
    lora, tools = record["lora"], record["tools"]
    if tools is None:
        return ""
    readers = lora["readers"]
    if not readers:
        only = f"Diffusers reads {code(lora['file'])}; other tools do not."
        return f"{only} For those export {_LONG}.\n\n"
    places = {"ComfyUI": " (`models/loras`)", "A1111": " (`models/Lora`)"}
    names = ", ".join(f"{tool}{places.get(tool, '')}" for tool in readers)
    text = f"{code(lora['file'])} is read whole by {names}; use it at strength 1."
    if "comfyui" in tools and "ComfyUI" in readers:
        text += " `workflow.json` opens in ComfyUI with all that is listed here set."
    return text + "\n\n"


def tool_notes(record: Mapping[str, Any]) -> str:
    """The settings of ComfyUI and A1111 that sample the student as it was trained, as Markdown."""
    tools = record.get("tools")
    if tools is None:
        return ""
    if "why" in tools:
        return f"**Other tools.** {tools['why']}\n"
    told, visited = tools["comfyui"], record["visited_model_times"]
    rows = [f"- ComfyUI: {_numbers(told['sampler'], told['scheduler'], told)}{_shift(told)}"]
    if told.get("flux_guidance") is not None:
        rows.append(
            f"- ComfyUI tells a Flux guidance 3.5 unless a node `FluxGuidance` stands behind the "
            f"prompt: set it to {told['flux_guidance']:g}. That is not cfg."
        )
    if told["node"] is not None and told["node"][0] == "ModelSamplingDiscrete":
        prediction, zero_snr = told["node"][1]
        rows.append(
            f"- Node `ModelSamplingDiscrete` with {prediction}, zsnr {str(zero_snr).lower()}, "
            "where the checkpoint does not say so itself."
        )
    rows.append(
        "- ComfyUI, the trained times themselves: `SamplerCustom` with `ManualSigmas`: "
        f"`{told['sigmas']}`"
    )
    a1111 = tools["a1111"]
    if a1111 is not None:
        line = f"- A1111: {_numbers(a1111['sampler'], a1111['scheduler'], told)}"
        if a1111["visits"] != visited:
            line += f"; that visits {_times(a1111['visits'])} of the model's 1000 times"
        rows.append(line)
    trained = f"Trained for the model times {_times(visited)}."
    return "**Other tools.** " + trained + "\n\n" + "\n".join(rows) + "\n"


def _numbers(sampler: str, scheduler: str | None, told: Mapping[str, Any]) -> str:
    named = f"scheduler `{scheduler}`" if scheduler else "no scheduler visits the trained times"
    return f"sampler `{sampler}`, {named}, steps {told['steps']}, cfg {told['cfg']:g}"


def _shift(told: Mapping[str, Any]) -> str:
    if told["shift"] is None:
        return ""
    if told["node"] is None:
        return f", shift {told['shift']:g} (its own)"
    name, widgets = told["node"]
    return f", shift {told['shift']:g}: node `{name}` at {widgets[0]:g}"


def _times(times: Any) -> str:
    return ", ".join(f"{t:.1f}".removesuffix(".0") for t in times)
