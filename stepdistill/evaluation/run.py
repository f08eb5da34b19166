"""`stepdistill evaluate`: a teacher at N steps against students, same prompts and same seeds.

Images stream through the feature networks and are dropped; features lie in whole files, so that a
killed evaluation goes on and processes share the work (they need one common output_dir).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from stepdistill.core.method import Scorer
from stepdistill.data.lines import LineFile
from stepdistill.families.family import Family
from stepdistill.families.registry import teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.planning.blueprint import blueprint
from stepdistill.reporting.bars import bar
from stepdistill.reporting.values import counted
from stepdistill.storage.ranks import agreed, process_state, refusing_together

from .collect import Drawing, Lens, draw_into, read_into
from .features import FEATURES, FeatureNet, feature_net
from .images import Frame, image_files, open_image
from .measure import Filled, measure
from .options import Options
from .pictured import pictured_prompts
from .protocol import protocol_of
from .report import Report, write_report
from .scores import Judges
from .store import Store, settings_hash
from .systems import Loading, Source, student_sources, teacher_sources, with_distinct_labels
from .videos import DEFAULT_FRAMES, check_video, shown_of

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@refusing_together()
def evaluate(
    options: Options,
    nets: Sequence[FeatureNet] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> Report:
    """Draw what is missing, measure, and write the report's files into output_dir.

    Args: nets: feature networks of your own in place of options.features; scorers: judges of your
        own by name, beside those of the options.
    Errors: ValueError for wrong options, before any image is drawn.
    """
    family = teacher_facts(options.source).family
    state = process_state()
    opened = open_judges(options, state.device, nets, scorers)
    lens, prompts, files, out = opened.lens, opened.prompts, opened.files, Path(options.output_dir)
    sources = _sources(options, family, state.device, out)
    nets, facts = lens.nets, opened.facts
    drawings = [_drawing(options, family, prompts, seed) for seed in options.seeds]
    filled = _fill(options, facts, lens, sources, drawings, files, state)
    systems, drawn = measure(filled)
    protocol = protocol_of(options, facts, prompts, len(files), drawn, drawings[0].frames)
    report = Report(
        title=Path(options.teacher).name + (" and its students" if options.student else ""),
        systems=systems,
        protocol={**protocol, "versions": versions()},
        reference="real" if files else "teacher",
        networks=[net.name for net in nets],
        folder=out,
    )
    if state.is_main_process:
        write_report(report, out)
    state.wait_for_everyone()
    return report


@dataclass(frozen=True)
class Opened:
    """What judges images: networks and scorers that were tried, prompts, files of real images, and
    the facts of all."""

    lens: Lens
    prompts: list[Any]
    files: list[Path]
    facts: dict[str, Any]


def open_judges(
    options: Options,
    device: torch.device,
    nets: Sequence[FeatureNet] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> Opened:
    """All that an evaluation needs beside pipelines. Args: see `evaluate`.

    Errors: ValueError for wrong options, and for networks that images of the teacher's size, or the
        first of the reference, can't be given to; before a pipeline is loaded.
    """
    family = teacher_facts(options.source).family
    frame = Frame(options.size_px, options.crop_px, options.resize_filter)
    check_video(options, family.output, bool(family.needs_images()))
    prompts = read_prompts(options)
    files = image_files(options.reference)[: options.num_reference] if options.reference else []
    check_counts(options, prompts, files)
    if nets is None:
        check_features(options.features)
    agreed(lambda: None)  # that no process refuses its machine's files
    if nets is None:
        nets = [feature_net(text, device) for text in options.features]
        check_distinct("names", [net.name for net in nets])
    judges = Judges.of(options, scorers or {}, device)
    lens = Lens(nets, judges.scorers, frame)
    images = [*map(open_image, files[:1]), *teacher_sized(options.source, options.resolution)]
    for image in images:
        lens.try_nets(image)
    networks = {net.name: net.facts for net in nets}
    facts = {"networks": networks, "frame": frame.text(), "scorers": judges.facts}
    return Opened(lens, prompts, files, facts)


def teacher_sized(source: ModelSource, resolution: int | None) -> list[Image.Image]:
    """An image like a teacher's, from its configurations alone; none where they lie elsewhere or
    the teacher makes no images."""
    if not (Path(source.described_at) / "model_index.json").is_file():
        return []
    try:
        family = blueprint(source.described_at, torch.float32)
    except Exception:  # what can't be known in advance is said when it is drawn
        return []
    vae = getattr(family.pipeline, "vae", None)
    channels = 3 if vae is None else vae.config.get("out_channels", 3)
    height, width = family.image_size(resolution)
    return [Image.new("L" if channels == 1 else "RGB", (width, height))]


def check_counts(options: Options, prompts: Sequence[Any], files: Sequence[Path]) -> None:
    """Errors: ValueError for numbers that are too small to draw or to measure anything."""
    least = {
        "num_images_per_prompt": options.num_images_per_prompt,
        "num_prompts": options.num_prompts,
        "num_reference": options.num_reference,
        "num_previews": options.num_previews + 1,
        "batch_size": options.batch_size,
        "shard_images": options.shard_images,
        "nearest_k": options.nearest_k,
        "teacher_steps": min(options.teacher_steps, default=0),
        "steps": min(options.steps, default=1),
        "seeds": min(options.seeds, default=0) + 1,
    }
    for name, value in least.items():
        if value is not None and value < 1:
            expected = "0 or more" if name in ("num_previews", "seeds") else "1 or more"
            raise ValueError(f"{name}: expected {expected}, got {getattr(options, name)!r}.")
    drawn = len(prompts) * options.num_images_per_prompt
    if drawn < 2:
        raise ValueError(
            "num_images_per_prompt: expected two images or more to measure a spread, got one. "
            "Raise it, or give more prompts."
        )
    if options.reference is not None and len(files) < 2:
        raise ValueError(
            f"reference: expected two images or more in {options.reference!r}, got {len(files)}."
        )


def check_features(texts: Sequence[str]) -> None:
    """Errors: ValueError for no network, or two of one kind, whose rows would share a name."""
    if not texts:
        raise ValueError("features: expected a feature network, got none. See evaluate --help.")
    kinds = [kind if (kind := text.partition(":")[0]) in FEATURES else text for text in texts]
    check_distinct("kinds", kinds)


def check_distinct(what: str, names: Sequence[str]) -> None:
    """Errors: ValueError for feature networks whose rows would share a name."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"features: expected networks of different {what}, got {name} twice. Evaluate with "
                "each in a call of its own; images are drawn anew."
            )


def read_prompts(options: Options) -> list[Any]:
    """The prompts, labels, or (unconditional) as many None. Errors: ValueError for none or few."""
    facts = teacher_facts(options.source)
    conditioning = facts.conditioning
    if conditioning == "none":
        return [None] * (options.num_prompts or 64)
    if options.first_frames is not None:
        prompts = pictured_prompts(options.first_frames, facts.family.reads)
        return _first(prompts, options.first_frames, options)
    if options.prompts_file is None:
        raise ValueError(
            f"prompts_file: expected a file of {conditioning}s for {options.teacher}, got none."
        )
    lines = _first(LineFile(options.prompts_file), options.prompts_file, options)
    for number, line in enumerate(lines if conditioning == "label" else (), start=1):
        if not line.strip().isdigit():
            raise ValueError(
                f"prompts_file: expected a class number in every line of {options.prompts_file}, "
                f"got {line!r} in line {number}."
            )
    return lines


def _first(lines: Sequence[Any], source: str, options: Options) -> list[Any]:
    wanted = options.num_prompts or len(lines)
    if not 0 < wanted <= len(lines):
        raise ValueError(
            f"num_prompts: expected at most the {counted(len(lines), 'line')} of {source}, got "
            f"{wanted}. Give a longer file, or --num_prompts."
        )
    return list(lines[:wanted])


def _sources(
    options: Options, family: type[Family], device: torch.device, out: Path
) -> list[Source]:
    loading = Loading(
        device,
        DTYPES[options.dtype],
        options.resolution,
        options.guidance,
        options.student_guidance,
        options.num_frames,
        family.output,
        bool(family.needs_images()),
    )
    counts = sorted(set(options.teacher_steps))
    sources = teacher_sources(options.source, counts, loading)
    for path in options.student:
        steps = list(dict.fromkeys(options.steps))
        sources += student_sources(path, steps, loading, out / "exports")
    return with_distinct_labels(sources)


def _drawing(options: Options, family: type[Family], prompts: Sequence[Any], seed: int) -> Drawing:
    per, shown, frames = options.num_images_per_prompt, options.num_previews, None
    if family.output == "frames":
        frames = options.frames or DEFAULT_FRAMES
        shown = max(1, shown // shown_of(frames))
    return Drawing(prompts, per, seed, options.batch_size, shown, frames)


def _fill(
    options: Options,
    facts: Mapping[str, Any],
    lens: Lens,
    sources: Sequence[Source],
    drawings: Sequence[Drawing],
    files: Sequence[Path],
    state: PartialState,
) -> Filled:
    """The stores, each filled by all processes."""
    root = Path(options.output_dir) / "features"
    where = (state.process_index, state.num_processes)

    def counting(label: str, count: int) -> Any:
        return bar(total=count, desc=label, unit="image", disable=not state.is_main_process)

    real = None
    if files:
        identity = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        settings = {**facts, "files": settings_hash({"files": identity}), "versions": versions()}
        real = Store.of(root, "real", settings, len(files), options.shard_images)
        with counting("real images", len(files)) as progress:
            seen = (options.batch_size, options.num_previews)
            read_into(real, files, lens, *seen, *where, progress.update)
    stores = {}
    for place, source in enumerate(sources):
        for index, drawing in enumerate(drawings):
            settings = {
                **facts,
                "source": source.settings,
                "dtype": options.dtype,
                "prompts": settings_hash({"prompts": list(drawing.prompts)}),
                "per_prompt": drawing.per_prompt,
                "seed": drawing.seed,
                "versions": versions(),
            }
            if drawing.frames is not None:
                settings["frames"] = drawing.frames
            name = f"{source.group}_{source.steps}"
            store = Store.of(root, name, settings, len(drawing), options.shard_images)
            with counting(
                f"{source.label}, {counted(source.steps, 'step')}", len(drawing)
            ) as progress:
                try:
                    draw_into(store, source.load, drawing, lens, *where, progress.update)
                except FloatingPointError as err:
                    name = f"{source.label} at {counted(source.steps, 'step')}"
                    raise ValueError(f"{name}: {err}.") from err
            stores[place, index] = store
        source.release()
    state.wait_for_everyone()
    nets = [net.name for net in lens.nets]
    return Filled(sources, stores, real, drawings, nets, options.nearest_k)


def versions() -> dict[str, str]:
    """Of the libraries that images and features depend on."""
    names = ("torch", "diffusers", "transformers", "pillow", "stepdistill")
    return {name: importlib.metadata.version(name) for name in names}
