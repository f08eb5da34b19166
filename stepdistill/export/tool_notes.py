"""What a card says of ComfyUI and A1111: the file's place, and the numbers to set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.reporting.markdown import code
from stepdistill.reporting.values import counted

_LONG = "`--format kohya` (A1111, ComfyUI, sd-scripts) or `--format comfyui`"


def usage(record: Mapping[str, Any]) -> str:
    """The numbers in one line."""
    comfy = (record["tools"] or {}).get("comfyui")
    steps = counted(record["num_inference_steps"], "step")
    if comfy is None:
        return steps
    scheduler = comfy["scheduler"] or "ManualSigmas"
    return f"{steps}, sampler {comfy['sampler']}, scheduler {scheduler}, CFG {comfy['cfg']:g}"


def file_note(record: Mapping[str, Any]) -> str:
    """Which tool reads the file of a LoRA export whole, and where it is put."""
    lora, tools = record["lora"], record["tools"]
    if (experts := record.get("experts")) is not None:
        parts = {"transformer": "high", "transformer_2": "low"}
        named = ", ".join(f"{code(f)} ({parts[c]} noise)" for c, f in lora["files"].items())
        calls = f"{experts['calls']['high']} calls of high noise, {experts['calls']['low']} of low"
        alone = "" if len(lora["files"]) == 2 else " The other expert's file is its own run's."
        return f"Files: {named}; {calls}, guidance 1, strength 1.{alone}\n\n"
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
    comfy, visited = tools["comfyui"], record["visited_model_times"]
    rows = [f"- ComfyUI: {_numbers(comfy['sampler'], comfy['scheduler'], comfy)}{_shift(comfy)}"]
    if comfy.get("flux_guidance") is not None:
        rows.append(
            f"- ComfyUI tells a Flux guidance 3.5 unless a node `FluxGuidance` stands behind the "
            f"prompt: set it to {comfy['flux_guidance']:g}. That is not cfg."
        )
    if comfy["node"] is not None and comfy["node"][0] == "ModelSamplingDiscrete":
        prediction, zero_snr = comfy["node"][1]
        rows.append(
            f"- Node `ModelSamplingDiscrete` with {prediction}, zsnr {str(zero_snr).lower()}, "
            "where the checkpoint does not say so itself."
        )
    rows.append(
        "- ComfyUI, the trained times themselves: `SamplerCustom` with `ManualSigmas`: "
        f"`{comfy['sigmas']}`"
    )
    a1111 = tools["a1111"]
    if a1111 is not None:
        line = f"- A1111: {_numbers(a1111['sampler'], a1111['scheduler'], comfy)}"
        if a1111["visits"] != visited:
            line += f"; that visits {_times(a1111['visits'])} of the model's 1000 times"
        rows.append(line)
    trained = f"Trained for the model times {_times(visited)}."
    return "**Other tools.** " + trained + "\n\n" + "\n".join(rows) + "\n"


def _numbers(sampler: str, scheduler: str | None, settings: Mapping[str, Any]) -> str:
    named = f"scheduler `{scheduler}`" if scheduler else "no scheduler visits the trained times"
    return f"sampler `{sampler}`, {named}, steps {settings['steps']}, cfg {settings['cfg']:g}"


def _shift(settings: Mapping[str, Any]) -> str:
    if settings["shift"] is None:
        return ""
    if settings["node"] is None:
        return f", shift {settings['shift']:g} (its own)"
    name, widgets = settings["node"]
    return f", shift {settings['shift']:g}: node `{name}` at {widgets[0]:g}"


def _times(times: Any) -> str:
    return ", ".join(f"{t:.1f}".removesuffix(".0") for t in times)
