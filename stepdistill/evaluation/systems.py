"""What is compared: a teacher pipeline at some step counts, and students however they were saved.

A student is an exported pipeline, an exported LoRA (put on its teacher), the folder of a training
run (exported here for each asked step count), or any other few-step pipeline.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from stepdistill.export.base_model import base_model
from stepdistill.export.card import call_options
from stepdistill.export.pipeline import RECORD
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family
from stepdistill.families.size import size_fits
from stepdistill.loading.expert_files import refuse_other_expert
from stepdistill.loading.project_code import part_class
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import lora_facts
from stepdistill.storage.files import RUN_FILE, read_json
from stepdistill.training.memory import release_memory

from .samples import PipelineSampler
from .store import settings_hash


@dataclass(frozen=True)
class Source:
    """Something to draw images from. settings: all that its images depend on; load: builds it;
    release: lets go of what it shares with the sources before it; path: where it lies."""

    label: str
    group: str
    steps: int
    settings: dict[str, Any]
    load: Callable[[], PipelineSampler]
    release: Callable[[], None] = lambda: None
    path: str = ""


@dataclass(frozen=True)
class Loading:
    """How pipelines are loaded and called. resolution, num_frames: height and width in px, and
    a video's frames, or the model's own; output, reads_image: what all must be (of Family: output,
        needs_images).

    guidance, student_guidance: null + g (cond - null), of the teacher (None: the pipeline class's
    default) and of a student without distillation.json.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    resolution: int | None = None
    guidance: float | None = None
    student_guidance: float = 1.0
    num_frames: int | None = None
    output: str = "images"
    reads_image: bool = False


def teacher_sources(teacher: ModelSource, counts: Sequence[int], loading: Loading) -> list[Source]:
    """The teacher at each step count; one loaded pipeline serves them all."""

    def loaded() -> Family:
        family = _family(teacher, loading)
        size_fits(loading.resolution, family)
        return family

    load = functools.cache(loaded)
    about = _weights(teacher.model) | {"teacher_lora": lora_facts(teacher.teacher_lora)}
    made = [_plain("teacher", "teacher", n, load, about, loading, loading.guidance) for n in counts]
    return _released(made, load)


def student_sources(
    path: str, counts: Sequence[int], loading: Loading, exports: Path
) -> list[Source]:
    """The sources of one `--student`. Args: exports: where runs are exported to.

    Errors: ValueError for a folder that holds no student, or steps that it was not exported for.
    """
    folder = Path(path)
    if (folder / RUN_FILE).is_file():
        return _run_sources(folder, counts, loading, exports)
    if not (folder / RECORD).is_file():
        if not counts:
            raise ValueError(
                f"student: expected an export with {RECORD}, a run, or --steps for another "
                f"pipeline, got {path!r} and no steps."
            )
        load = functools.cache(lambda: _family(path, loading))
        name, about = folder.name or path, _weights(path)
        made = [
            _plain(name, "student", n, load, about, loading, loading.student_guidance, path)
            for n in counts
        ]
        return _released(made, load)
    source = _export_source(folder, loading)
    if counts and source.steps not in counts:
        raise ValueError(
            f"student: expected {path} to be exported for one of {list(counts)} steps, got "
            f"{source.steps}. Give the run's folder instead, or leave --steps out."
        )
    return [source]


def _released(sources: Sequence[Source], load: Any) -> list[Source]:
    """The sources of one loaded pipeline, which the last lets go: another's memory is its own."""

    def release() -> None:
        load.cache_clear()
        release_memory()

    return [*sources[:-1], *(replace(one, release=release) for one in sources[-1:])]


def with_distinct_labels(sources: Sequence[Source]) -> list[Source]:
    """With labels that differ where step counts do not: longer parts of their paths.

    Errors: ValueError for a student that was given twice.
    """
    made = list(sources)
    for parts in range(2, 32):
        names = [(one.label, one.steps) for one in made]
        same = [names.count(name) > 1 for name in names]
        if not any(same):
            break
        for place, one in enumerate(made):
            if same[place] and one.path:
                made[place] = replace(one, label="/".join(Path(one.path).resolve().parts[-parts:]))
    else:
        name = next(one.path for one, twice in zip(made, same, strict=True) if twice)
        raise ValueError(f"student: expected each once, got {name!r} twice. Leave one out.")
    return made


def _export_source(folder: Path, loading: Loading, label: str = "", path: str = "") -> Source:
    record = read_json(folder / RECORD, ("num_inference_steps", "call", "conditioning", "run"))
    call = call_options(record)
    lora = record.get("lora")
    if (expert := record.get("expert", "both")) != "both":
        raise ValueError(
            f"student: expected a student that makes images, got {folder}, of the {expert}-noise "
            "expert alone. Export the low-noise run with --high_student."
        )

    def load() -> PipelineSampler:
        if lora is None:
            family = _family(str(folder), loading)
        else:
            base = replace(ModelSource.of_run(record["run"]), model=str(record["base_model"]))
            family = _family(base, loading)
            _put_lora(family, folder, lora["file"], lora.get("files", {}))
            if (experts := record.get("experts")) is not None:
                family.pipeline.register_to_config(boundary_ratio=experts["boundary_ratio"])
        told = {**_own_size(family), **call, **_size_options(family, loading)}
        return PipelineSampler(family.pipeline, told, record["conditioning"])

    about = _weights(str(folder)) | {"call": {**call, **_size(loading)}}
    if lora is not None:
        about["base"] = _weights(str(record["base_model"]))
    name, steps = label or _short(folder), int(record["num_inference_steps"])
    return Source(name, "student", steps, about, load, path=path or str(folder))


def _run_sources(run: Path, counts: Sequence[int], loading: Loading, exports: Path) -> list[Source]:
    from stepdistill.trainers import trainer_of_run

    trainer = trainer_of_run(run)
    # Runs of one name in different folders have exports of their own.
    name = f"{run.name}-{settings_hash({'run': str(run.resolve())})}"
    folders = [
        trainer.export(exports / f"{name}_{count or 'own'}", count) for count in counts or (None,)
    ]
    return [_export_source(folder, loading, run.name, str(run)) for folder in folders]


def _plain(
    label: str,
    group: str,
    steps: int,
    load: Callable[[], Family],
    about: dict[str, Any],
    loading: Loading,
    guidance: float | None,
    path: str = "",
) -> Source:
    """A pipeline called with a number of steps and, where it has any, a guidance."""

    def sampler() -> PipelineSampler:
        family = load()
        call: dict[str, Any] = {"num_inference_steps": steps}
        call |= {**_own_size(family), **family.length_call, **_size_options(family, loading)}
        if guidance is not None and family.has_null:
            call |= family.guided_call(guidance)
            call["guidance_scale"] = family.stock_guidance(guidance)
        return PipelineSampler(family.pipeline, call, family.conditioning)

    settings = {**about, "steps": steps, "guidance": guidance, **_size(loading)}
    return Source(label, group, steps, settings, sampler, path=path)


def _family(model: str | ModelSource, loading: Loading) -> Family:
    family = load_family(model, torch_dtype=loading.dtype)
    made, wanted = bool(family.needs_images()), (loading.output, loading.reads_image)
    if (family.output, made) != wanted:
        raise ValueError(
            f"evaluate: expected {_kind(*wanted)}, as the teacher is, "
            f"got {_kind(family.output, made)} in {str(model)!r}."
        )
    family.pipeline.to(loading.device)
    return family


def _put_lora(family: Family, folder: Path, file: str, files: Mapping[str, str]) -> None:
    """A LoRA export's adapter and scheduler on its teacher, by the stock loaders.

    Args: files: component -> file, of an export of two; else `file` is its one.
    Errors: ValueError where a file says that it is another expert's.
    """
    pipeline: Any = family.pipeline
    if file == "adapter_model.safetensors":  # no loader in Diffusers: PEFT's files
        adapted: Any = PeftModel.from_pretrained(family.net, str(folder))
        setattr(pipeline, family.net_name, adapted.merge_and_unload())
    else:
        for component, name in (files or {family.net_name: file}).items():
            second = component != family.net_name
            if len(files) == 2:
                refuse_other_expert(folder / name, "low" if second else "high", "student")
            named = {"weight_name": name, "adapter_name": "student"}
            into = {f"load_into_{component}": True} if second else {}
            pipeline.load_lora_weights(str(folder), **named, **into)
    config = read_json(folder / "scheduler" / "scheduler_config.json", ("_class_name",))
    code = next((folder / "scheduler").glob("*.py"), None)  # one of pipelines/, or none
    cls = part_class(code.stem if code else "diffusers", str(config["_class_name"]))
    pipeline.scheduler = cls.from_pretrained(str(folder), subfolder="scheduler")


def _weights(model: str) -> dict[str, Any]:
    """What tells a pipeline apart: hashes of weights and configurations, or the Hub's commit."""
    base = base_model(model)
    facts = {"model": base.hub_id or Path(model).name, "weights": base.sha256 or base.commit}
    if Path(model).is_dir():
        sha, root = hashlib.sha256(), Path(model)
        for file in sorted(root.rglob("*.json")):
            if file.name != RECORD:  # whose call is told, and whose rest changes no image
                sha.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
        facts["configs"] = sha.hexdigest()
    return facts


def _kind(output: str, reads_image: bool) -> str:
    made = "images" if output == "images" else "videos"
    return f"a pipeline that makes {made}{' from an image too' * reads_image}"


def _own_size(family: Family) -> dict[str, Any]:
    """Of videos, whose stock calls have a size of their own by default."""
    if family.output == "images":
        return {}
    return {
        name: value for name, value in family.call_extras.items() if name != family.image_argument
    }


def _size(loading: Loading) -> dict[str, int]:
    side, frames = loading.resolution, loading.num_frames
    size = {} if side is None else {"height": side, "width": side}
    return size if frames is None else {**size, "num_frames": frames}


def _size_options(family: Family, loading: Loading) -> dict[str, Any]:
    """`_size` as the family's stock call is told it. Errors: ValueError where it can't be."""
    side, size = loading.resolution, _size(loading)
    if side is None:
        return size
    told = family.size_options(side, side)
    if not told:
        raise ValueError(
            f"resolution: expected none beside {type(family.pipeline).__name__}, whose images have "
            f"their size from the given ones, got {side}. Resize those."
        )
    return {**size, **told}


def _short(folder: Path) -> str:
    """A label: the run's name where the export lies inside one as `pipeline`."""
    at = folder.resolve()
    return at.parent.name if at.name in ("pipeline", "lora") else at.name
