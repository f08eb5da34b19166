"""The model card of an export: what it is, and code that runs as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepdistill.export.tool_notes import tool_notes
from stepdistill.reporting.markdown import code, plain
from stepdistill.reporting.values import counted


def call_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call beside the prompt, from distillation.json."""
    given = dict(record["call"])
    steps = {} if "timesteps" in given else {"num_inference_steps": record["num_inference_steps"]}
    scale = record["guidance_scale"]  # None where there is no null to guide away from
    return {**steps, **({} if scale is None else {"guidance_scale": scale}), **given}


def typed_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `call_options` that the exported pipeline's own defaults do not give."""
    options: dict[str, Any] = record.get("typed", call_options(record))
    return options


def call_code(record: Mapping[str, Any], prompt: str = "a prompt") -> str:
    """The call's arguments as code, by `typed_options`."""
    arguments = (
        f", {key}={value:g}" if isinstance(value, float) else f", {key}={value!r}"
        for key, value in typed_options(record).items()
    )
    return (subject(record, prompt) + "".join(arguments)).removeprefix(", ")


def teacher_loras(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What was merged into the teacher: source, weight_name and scale of each.

    A folder here is named in full: the card's code runs from any other.
    """
    loras: Sequence[Mapping[str, Any]] = record["run"].get("teacher_lora", ())
    return [
        {**lora, "source": str(Path(lora["source"]).resolve())} if "sha256" in lora else lora
        for lora in loras
    ]


def lora_file(lora: Mapping[str, Any]) -> str:
    """Where one of those lies, its file with it."""
    return "/".join(filter(None, (lora["source"], lora.get("weight_name"))))


def load_arguments(record: Mapping[str, Any]) -> str:
    """What from_pretrained must be told beside the folder: parts that the base does without."""
    return "".join(f", {name}=None" for name in record["load_without"])


def subject(record: Mapping[str, Any], prompt: str = "a prompt") -> str:
    """The first argument of the call, as code."""
    if record["conditioning"] == "none":
        return ""
    if record.get("reads"):
        files = {"image": ("image", image_file(record["output"])), "mask": MASK_FILE}
        named = (files[name] for name in record["reads"])
        loaded = [f'{argument}=load_image("{file}")' for argument, file in named]
        return ", ".join([*loaded, f"prompt={prompt!r}"])
    if record["conditioning"] == "label":
        return "class_labels=[0]"
    return f"prompt={prompt!r}" if record.get("prompt_by_name") else repr(prompt)


MASK_FILE = ("mask_image", "mask.png")  # the argument, and what the card calls it


def image_file(output: str) -> str:
    """What the card calls the picture beside a prompt. Args: output: see Family.output."""
    return "first_frame.png" if output == "frames" else "input.png"


def snippet(record: Mapping[str, Any], where: str, prompt: str = "a prompt") -> str:
    """Three lines that load the pipeline from `where` and make an image."""
    trusted = ", trust_remote_code=True" if record.get("custom_code") else ""
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({where!r}{load_arguments(record)}{trusted})\n"
        f"{saving_code(record, prompt)}"
    )


def saving_code(record: Mapping[str, Any], prompt: str = "a prompt") -> str:
    """The call, and the saving of its image or video, as code."""
    call, loader = call_code(record, prompt), ", load_image" if record.get("reads") else ""
    if record.get("output") == "audios":
        return (
            "import wave\n"
            f"samples = (pipe({call}).audios[0].T.clamp(-1, 1) * 32767).short().cpu().numpy()\n"
            'with wave.open("sound.wav", "wb") as file:\n'
            "    rate = pipe.vae.config.sampling_rate\n"
            "    file.setparams((samples.shape[1], 2, rate, 0, 'NONE', ''))\n"
            "    file.writeframes(samples.tobytes())"
        )
    if record.get("output") != "frames":
        code = f'pipe({call}).images[0].save("image.png")'
        return f"from diffusers.utils{loader.replace(',', ' import')}\n{code}" if loader else code
    return (
        f"from diffusers.utils import export_to_video{loader}\n"
        f'export_to_video(pipe({call}).frames[0], "video.mp4")'
    )


def _guidance(record: Mapping[str, Any]) -> str:
    if record["guidance_scale"] is None:
        return "There is no guidance."
    scale = f"`guidance_scale={record['guidance_scale']:g}`"
    if record["guided"]:
        return f"Made for guidance: keep {scale}."
    guidance = "told to the network" if record["guidance_embedded"] else "folded in"
    if "guidance_scale" in typed_options(record):
        return f"Guidance is {guidance}: keep {scale}."
    return f"Guidance is {guidance}; the defaults are right."


def size_text(record: Mapping[str, Any]) -> str:
    """What size the student was trained at, in words."""
    height = record["call"].get("height")
    return "the model's own" if height is None else f"{height} px, not the model's own"


def data_text(data: Mapping[str, Any] | None) -> str | None:
    """A dataset by its facts (data.fingerprint)."""
    if not data:
        return None
    return f"{plain(data['source'])}, {data['items']} items, sha256 `{data['sha256'] or 'unknown'}`"


def changed_data(run: Mapping[str, Any]) -> str | None:
    """At which updates the run went on with other data (--data_changed ok), and its data before."""
    changes = (
        f"update {change['step']}, before: {data_text(change['before'])}"
        for change in run.get("data_changed", ())
    )
    return "; ".join(changes) or None


def students_text(record: Mapping[str, Any]) -> str | None:
    """How many students a routed pipeline has, and what a call picks one by."""
    students = record.get("students")
    return students and f"{students['count']}, one a call, by {students['by']}"


def write_card(folder: Path, record: Mapping[str, Any], pipeline_class: str, name: str) -> None:
    """README.md with Hub metadata, the snippet and the facts of the run."""
    base = record["base_model"]
    tags = ["diffusers", "stepdistill", "few-step", str(record["method"])]
    meta: dict[str, Any] = {"library_name": "diffusers", "tags": tags}
    if base and not Path(str(base)).exists():
        meta["base_model"] = base
    steps = record["num_inference_steps"]
    run = record["run"]
    folder.joinpath("README.md").write_text(
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n\n"
        f"# {plain(name)}\n\n"
        f"{pipeline_class} distilled from {code(base)} to {counted(steps, 'step')} "
        f"with {plain(record['method'])} ([stepdistill](https://pypi.org/project/stepdistill)).\n\n"
        f"```python\n{snippet(record, name)}\n```\n\n"
        f"{_guidance(record)} Trained times: {record['trained_times'] or 'all'}; export refuses "
        "step counts off them.\n"
        f"\n| | |\n|---|---|\n"
        f"| method | {plain(record['method'])} |\n"
        f"| student updates | {run.get('step', '?')} |\n"
        f"| seed | {run.get('seed', '?')} |\n"
        f"| times | {record['times']} |\n"
        f"| size | {size_text(record)} |\n"
        + (f"| students | {students} |\n" if (students := students_text(record)) else "")
        + (f"| data changed at | {changed} |\n" if (changed := changed_data(run)) else "")
        + "".join(
            f"| merged into the teacher | {code(lora_file(lora))} at scale {lora['scale']:g} |\n"
            for lora in teacher_loras(record)
        )
        + f"\n{tool_notes(record)}"
    )
