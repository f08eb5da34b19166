"""Find and load the family that serves a pipeline: by the class named in model_index.json.

Everything that can be wrong with a model id is said before a weight is read.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import DummyObject

from stepdistill.core.method import Setting
from stepdistill.families import FAMILIES
from stepdistill.families.experts import PARTS, one_expert
from stepdistill.families.family import Family
from stepdistill.families.generic import generic_family
from stepdistill.families.parts import Parts
from stepdistill.families.schedule import own_sampler, read_schedule
from stepdistill.loading.expert_files import expert_of, refuse_half_pair, refuse_other_expert
from stepdistill.loading.merge_loras import merge_loras
from stepdistill.loading.paper import part_config
from stepdistill.loading.project_code import part_class
from stepdistill.loading.quantization import loader_config, requantized
from stepdistill.loading.safe_files import load_part, load_stock
from stepdistill.loading.scheduler_config import check_scheduler
from stepdistill.loading.single_file import load_single_file, schedule_marks
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import parse_lora
from stepdistill.loading.weightless import weightless
from stepdistill.storage.files import one_line


def family_for(pipeline_class: str) -> type[Family]:
    """The family that serves a Diffusers pipeline class name, the generic one where none is made.

    Errors: ValueError naming the nearest served classes, where the generic one can't serve it.
    """
    served = {name: family for family in FAMILIES.values() for name in family.pipelines}
    if pipeline_class not in served:
        try:
            generic = generic_family(pipeline_class)
        except ValueError:
            pass  # the message below says what is served
        else:
            warnings.warn(
                f"model: {pipeline_class} has no family of its own; the generic one listens to its "
                "call. Run `stepdistill check` on it, and train only where it passes.",
                stacklevel=2,
            )
            return generic
        near = difflib.get_close_matches(pipeline_class, served, n=3, cutoff=0.3)
        raise ValueError(
            f"model: expected a pipeline class that has a family, got {pipeline_class!r}. "
            f"Nearest: {near or sorted(served)}."
        )
    return served[pipeline_class]


def load_family(
    model: str | Path | ModelSource,
    *,
    torch_dtype: torch.dtype = torch.float32,
    **components: Any,
) -> Family:
    """The loaded family of a folder, Hub id or single file; safetensors only, never remote code.

    Parts saved as None (SD3 without T5) stay None: the stock loader wants to be told so.

    Args:
        model: a ModelSource where more than a path or Hub id is to be said.
        components: parts to pass to from_pretrained instead of loading them (None to leave out).
    """
    source = ModelSource.of(model)
    source.check()
    index = source.index
    cls = family_for(source.pipeline_class)
    _check_parts(source, cls, components)
    if "scheduler" not in components:
        _setting(source, cls.sends_sigmas)
    missing = {name: None for name, entry in index.items() if entry == [None, None]}
    parts = {**missing, **components}
    folders = _net_folders(source, cls)  # of the denoisers
    kind = source.base_quantization
    quantized = kind != "none" and cls.net_name not in parts
    # There is no folder to read a quantised one from.
    made_here = bool(source.teacher_lora) or source.is_single_file
    dtype = source.base_dtype or torch_dtype
    hub = {"variant": source.variant, **source.hub}

    def nets(**options: Any) -> dict[str, Any]:
        where = (source.model, index)
        named = {**hub, "dtype": dtype, **options}
        return {name: load_part(*where, folder, **named) for name, folder in folders.items()}

    if quantized and not made_here:
        parts |= nets(quantization_config=loader_config(kind, dtype))
    elif source.expert != "both" and cls.net_name not in parts and not source.is_single_file:
        parts |= nets(dtype=torch_dtype)
    if source.expert != "both":
        parts[PARTS["low"]] = None
    if source.is_single_file:
        if "scheduler" not in parts:
            parts["scheduler"] = _scheduler(source)
        for name in cls.side_nets.keys() - parts.keys():  # no such file holds one
            beside = {**hub, "dtype": torch_dtype}
            parts[name] = load_part(source.described_at, index, name, **beside)
        where = (source.model, index, source.described_at, cls.net_name)
        pipeline = load_single_file(*where, torch_dtype, **parts)
    else:
        pipeline = load_stock(source.model, index, dtype=torch_dtype, **hub, **parts)
    if cls.conditioning == "prompt":
        _check_encoders(pipeline)
    merge_loras(pipeline, source.teacher_lora, _merged_into(source, cls))
    if quantized and made_here:
        for name in folders:
            made = requantized(getattr(pipeline, name), kind, dtype)
            pipeline.register_modules(**{name: made})
    if source.expert != "both":
        pipeline.register_to_config(boundary_ratio=None)
    family = cls(pipeline)
    family.owned = _owned(source)
    if quantized:
        plain = replace(source, base_quantization="none")
        again = partial(load_family, plain, torch_dtype=dtype, **components)
        family.unquantized = lambda: again().net
        if not made_here and len(folders) == 1:
            family.unquantized = lambda: nets()[cls.net_name]
    return family


def _net_folders(source: ModelSource, cls: type[Family]) -> dict[str, str]:
    """The denoisers of a pipeline as it is loaded -> the parts of the folder that they are read of.

    Errors: ValueError where one of two experts is asked for and there are no two, or both are and
        what else is asked for says nothing of which of them it is for.
    """
    index, expert = source.index, source.expert
    loras = [parse_lora(text).path for text in source.teacher_lora]
    if expert == "both":
        names = cls.nets_in(index)
        if len(names) > 1 and source.is_single_file:
            raise ValueError(
                "expert: expected high or low beside one file, which says nothing of which of the "
                "two networks it is for, got both. Set --expert high, and low in a run of its own."
            )
        if len(names) > 1 and loras:
            refuse_half_pair(loras, "teacher_lora")
        return {name: name for name in names}
    for file in loras:
        refuse_other_expert(file, expert, "teacher_lora")
    one_expert(expert, index.get("boundary_ratio"), source.pipeline_class)
    return {cls.net_name: PARTS[expert]}


def _merged_into(source: ModelSource, cls: type[Family]) -> list[str]:
    """The denoiser that each LoRA of the teacher is merged into."""
    if source.expert != "both" or len(cls.nets_in(source.index)) == 1:
        return [cls.net_name] * len(source.teacher_lora)
    files = [parse_lora(text).path for text in source.teacher_lora]
    return [PARTS[str(expert_of(file))] for file in files]  # `_net_folders` has looked


def _owned(source: ModelSource) -> tuple[float, float]:
    """(lowest, highest) time of the denoiser that is loaded."""
    ratio = source.index.get("boundary_ratio")
    return one_expert(source.expert, ratio, source.pipeline_class)[1]


def _check_parts(source: ModelSource, cls: type[Family], given: Mapping[str, Any]) -> None:
    """Errors: ValueError where model_index.json has no denoiser, scheduler or autoencoder for the
    pipeline class.

    Args: given: parts that are handed over in place of the folder's.
    """
    takes = inspect.signature(getattr(diffusers, source.pipeline_class).__init__).parameters
    folders = _net_folders(source, cls).values()
    for name in (*folders, "scheduler", *(["vae"] if "vae" in takes else [])):
        entry = source.index.get(name)
        named = isinstance(entry, list | tuple) and len(entry) == 2 and None not in entry
        if name not in given and not named:
            raise ValueError(
                f"{source.described_at}/model_index.json: expected a class for {name}, got "
                f"{entry!r}. Save the pipeline with it."
            )
    for name, expected in cls.side_nets.items():
        entry, where = source.index.get(name), f"{source.described_at}/model_index.json"
        got = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else entry
        cls.check_side_class(name, got, expected, where)
    if cls.side_nets and not given.keys() & cls.side_nets.keys():
        described = (*folders, *cls.side_nets, "vae")
        configs = {name: _part_config(source, name) for name in described}
        cls.check_configs(configs, source.described_at)
    if cls in FAMILIES.values() and {cls.net_name, "vae"} <= source.index.keys() - given.keys():
        _check_channels(source, cls)


def _check_channels(source: ModelSource, family: type[Family]) -> None:
    """Errors: ValueError for a denoiser that reads other channels than its pipeline gives: the
    noisy latents, and what the family says stands beside them."""
    net_name = family.net_name
    if not all(source.index[name][0] == "diffusers" for name in (net_name, "vae")):
        return  # a class of the project's own, whose code is not read for this
    if inspect.getattr_static(family, "input_channels") is vars(Parts)["input_channels"]:
        return  # which says nothing: so no configuration is read
    vae = {"latent_channels": 4, **_part_config(source, "vae")}
    reads, wanted = _part_config(source, net_name).get("in_channels"), family.input_channels(vae)
    if None in (reads, wanted) or reads == wanted:
        return
    plain = _plain(family)
    if reads == plain.input_channels(vae):
        advice = (
            f"It is an ordinary text-to-image model: name {plain.pipelines[0]} as _class_name in "
            "model_index.json; its student runs in either."
        )
    else:
        alike = [f for f in FAMILIES.values() if _plain(f) is plain]
        served = {f.input_channels(vae): f.pipelines[0] for f in alike}
        advice = f"Save it as the pipeline that it is of ({served.get(reads, 'none is served')})."
    raise ValueError(
        f"{source.described_at}/{net_name}/config.json: expected in_channels {wanted} in a "
        f"{source.pipeline_class}, got {reads}. {advice}"
    )


def _plain(family: type[Family]) -> type[Family]:
    """The family of the same models that reads no images beside x_t; itself where none does."""
    bases: Any = family.__mro__
    return next((f for f in bases if "pipelines" in vars(f) and not f.reads), family)


def load_encoders(model: str | Path | ModelSource, device: torch.device) -> Family:
    """A family to encode prompts and images with: no weight of its denoiser (or what stands beside
    it) is read or held.

    Its denoiser has its configuration and shapes, and one zero on `device` for all weights. It is
    loaded after all with teacher_lora, as merging reads both.
    """
    source = ModelSource.of(model)
    parts: dict[str, Any] = {}
    if not source.teacher_lora:
        at, index = source.described_at, source.index
        cls = family_for(source.pipeline_class)
        folders = {**_net_folders(source, cls), **{name: name for name in cls.side_nets}}
        for name, folder in folders.items():
            parts[name] = weightless(at, index, folder, device, **source.hub)
    return load_family(source, **parts)


def _check_encoders(pipeline: Any) -> None:
    """Errors: ValueError where no text encoder is left to encode a prompt with."""
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    if encoders and all(getattr(pipeline, name) is None for name in encoders):
        raise ValueError(
            f"model: expected one of {encoders} to encode prompts, got a pipeline without any. "
            "Save it with its text encoder; SD3 may go without T5, SDXL without its first."
        )


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of a teacher before, and without, loading a weight.

    family, pipeline: the Family class, and the Diffusers class name it was found by.
    conditioning: "prompt", "label" or "none". has_null: whether there is an empty condition to
    guide away from. needs_images: what it needs beside the prompt (see Family.reads).
    num_labels: how many class labels it knows; None where it reads none. told_guidance: whether a
    student of it can be told the guidance. num_nets: how many denoisers share the times.
    frame_size: (height, width) of first frames, px.
    """

    family: type[Family]
    pipeline: str
    conditioning: Literal["prompt", "label", "none"]
    has_null: bool
    needs_images: tuple[str, ...]
    setting: Setting
    num_labels: int | None = None
    told_guidance: bool = False
    num_nets: int = 1
    frame_size: tuple[int, int] | None = None


def teacher_facts(teacher: str | Path | ModelSource | Family) -> TeacherFacts:
    """The facts of a loaded Family, or of a folder, Hub id or single file from its configurations.

    Errors: ValueError for a class that no family serves, or configurations that can't be read.
    """
    if isinstance(teacher, Family):
        name = type(teacher.pipeline).__name__
        facts = (teacher.conditioning, teacher.has_null, teacher.needs_images(), teacher.setting)
        in_config = teacher.labels_in(teacher.config), teacher.told_guidance_in(teacher.config)
        frames = (
            teacher.frame_size_in(teacher.pipeline.vae.config)
            if teacher.from_first_frame()
            else None
        )
        counted = len(teacher.net_parts)
        return TeacherFacts(type(teacher), name, *facts, *in_config, counted, frames)
    source = ModelSource.of(teacher)
    cls = family_for(source.pipeline_class)
    _check_parts(source, cls, {})
    reads = cls.conditioning == "label" or cls.supports_w
    config = _part_config(source, cls.net_name) if reads else {}
    vae = _part_config(source, "vae") if cls.from_first_frame() else {}
    return TeacherFacts(
        cls,
        source.pipeline_class,
        cls.conditioning_in(config),
        cls.null_in(source.index),
        cls.needs_images(),
        replace(_setting(source, cls.sends_sigmas), owned=_owned(source)),
        cls.labels_in(config),
        cls.told_guidance_in(config),
        len(_net_folders(source, cls)),
        cls.frame_size_in(vae),
    )


def _part_config(source: ModelSource, name: str) -> Any:
    part = part_class(*source.index[name])
    return part_config(part, True, source.described_at, name, source.hub)


def _setting(source: ModelSource, sends_sigmas: float) -> Setting:
    """From the scheduler's config alone, and the marks of a single file."""
    try:
        scheduler = _scheduler(source)
        path, kind, shift = read_schedule(scheduler)
        shift *= sends_sigmas or 1.0
        return Setting(path, kind, shift, partial(own_sampler, scheduler, path, sends_sigmas))
    except ValueError:
        raise
    except Exception as err:  # whatever a stock class raises at values it can't use
        raise _unreadable(source, err) from err


def _scheduler(source: ModelSource) -> Any:
    """The teacher's scheduler. Errors: ValueError for a config that can't be read, or one that a
    single file's own marks (schedule_marks) contradict."""
    where = f"{source.described_at}/scheduler/scheduler_config.json"
    library, name = source.index["scheduler"]
    try:
        cls = part_class(library, name)
        if isinstance(cls, DummyObject):  # Diffusers' stand-in where a package is not installed
            raise TypeError(f"{name}, which needs torchsde: pip install 'stepdistill[audio]'")
        if not issubclass(cls, SchedulerMixin):
            raise TypeError(f"{name}, which is no scheduler")
        config = cls.load_config(source.described_at, subfolder="scheduler", **source.hub)
    except Exception as err:  # whatever broken files make the stock reader stumble over
        raise _unreadable(source, err) from err
    check_scheduler(cls, config, where)
    marks = schedule_marks(source.model) if source.is_single_file else {}
    takes = inspect.signature(cls.__init__).parameters
    kinds = [c.get("prediction_type", "epsilon") for c in (config, {**config, **marks})]
    if not marks.keys() <= takes.keys() or (kinds[0] != kinds[1] != "v_prediction"):
        raise ValueError(
            f"single_file_config: expected a scheduler that fits {source.model}, which is "
            f"marked {marks}, got {name} with prediction_type {kinds[0]!r} in {where}. Name a "
            "pipeline with such a scheduler (DDIMScheduler takes all marks)."
        )
    try:
        return cls.from_config({**config, **marks})
    except Exception as err:  # whatever a stock class raises at values that do not go together
        raise _unreadable(source, err) from err


def _unreadable(source: ModelSource, err: Exception) -> ValueError:
    return ValueError(
        f"{source.described_at}/scheduler: expected a readable scheduler config, got "
        f"{one_line(err)}."
    )
