"""From filled stores to the rows of a report: means over noise seeds, the teacher beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collect import Drawing, preview_indices, preview_name
from .metrics import System, diversity, drift, numbers_of, seconds_per_image, set_distances
from .store import Store
from .systems import Source
from .videos import SHOWN_FRAMES, frame_distance, per_frame, per_video

DRAWN = ("peak_of", "batch_size", "device", "size")  # a shard's facts that the protocol tells


@dataclass(frozen=True)
class Filled:
    """What was collected. stores: of each source (by its place) and noise seed; real: or None."""

    sources: Sequence[Source]
    stores: Mapping[tuple[int, int], Store]
    real: Store | None
    drawings: Sequence[Drawing]  # one for each noise seed
    nets: Sequence[str]
    nearest_k: int

    @property
    def base(self) -> int:
        """The place of the teacher at most steps, which others are compared with."""
        teachers = [i for i, source in enumerate(self.sources) if source.group == "teacher"]
        return max(teachers, key=lambda i: self.sources[i].steps)


def measure(filled: Filled) -> tuple[list[System], dict[str, str]]:
    """(a System for the real images and for each source; how they were drawn).

    The latter as the shards say it, which an earlier call with other options may have made.
    """
    systems: list[System] = []
    real: dict[str, torch.Tensor] = {}
    drawn: dict[str, dict[str, None]] = {name: {} for name in DRAWN}
    first = filled.drawings[0]
    if filled.real is not None:
        real = filled.real.read()[0]
        count = filled.real.count
        pictures = previews(filled.real, range(min(first.num_previews, count)))
        numbers = numbers_of([_pixels(real)])
        systems.append(System("real images", "real", None, numbers, count, pictures))
    bases = [filled.stores[filled.base, i].read()[0] for i in range(len(filled.drawings))]
    for place, source in enumerate(filled.sources):
        by: dict[tuple[str, str], list[dict[str, float | None]]] = {}
        for index, drawing in enumerate(filled.drawings):
            seen, facts = filled.stores[place, index].read()
            for name, names in drawn.items():
                names.update(dict.fromkeys(str(one[name]) for one in facts if name in one))
            values_of = _values(filled, drawing, seen, bases[index], real)
            values_of["", ""] |= _costs(facts, "video" if "motion" in seen else "image")
            for key, values in values_of.items():
                by.setdefault(key, []).append(values)
        numbers = []
        for (network, reference), rows in by.items():
            if place == filled.base and reference == "teacher":
                continue  # a set against itself
            numbers += numbers_of(rows, network=network, reference=reference)
        frames = (
            min(seen["pixels"][0].flatten(0, -2).shape[0], SHOWN_FRAMES) if "motion" in seen else 1
        )
        pictures = previews(filled.stores[place, 0], preview_indices(first), frames)
        row = (source.label, source.group, source.steps, numbers, len(first), pictures, frames)
        systems.append(System(*row))
    return systems, {name: ", ".join(values) for name, values in drawn.items()}


def _values(
    filled: Filled,
    drawing: Drawing,
    seen: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    real: Mapping[str, torch.Tensor],
) -> dict[tuple[str, str], dict[str, float | None]]:
    """(network, reference) -> metric -> value, of one noise seed."""
    values: dict[tuple[str, str], dict[str, float | None]] = {}
    prompts = [drawing.prompt(i) for i in range(len(drawing))]
    for net in filled.nets:
        features = seen[f"features/{net}"]
        for name, reference in (("real", real), ("teacher", base)):
            if reference:
                against = per_frame(reference[f"features/{net}"])
                distances = set_distances(against, per_frame(features), filled.nearest_k)
                values[net, name] = dict(distances)
        values[net, ""] = {"diversity": diversity(per_video(features), prompts)}
        values[net, ""]["frame_distance"] = frame_distance(features)
    for key, value in seen.items():
        if key.startswith("score/"):
            score = float(value.double().mean())
            values[key.removeprefix("score/"), ""] = {"score": score}
    pixels, teacher = _pixels(seen), _pixels(base)
    values["", "teacher"] = {f"{k}_drift": drift(pixels[k], teacher[k]) for k in pixels}
    values["", ""] = dict(pixels)
    return values


def _pixels(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    mean = per_frame(tensors["pixels"]).double().mean(0)
    values = {"saturation": float(mean[0]), "contrast": float(mean[1])}
    if "motion" in tensors:
        values["motion"] = float(tensors["motion"].double().mean())
    return values


def _costs(facts: Sequence[Mapping[str, Any]], what: str) -> dict[str, float | None]:
    batches = [(int(n), float(s)) for shard in facts for n, s in shard["batches"]]
    return {
        f"seconds_per_{what}": seconds_per_image(batches),
        "network_calls": float(facts[0]["network_calls"]),
        "peak_memory_gib": max(float(shard["peak_gib"]) for shard in facts),
    }


def previews(store: Store, indices: Sequence[int], frames: int = 1) -> list[str]:
    """Paths of the store's preview pictures, `frames` of each video after one another.

    A finished set has those that were asked for when it was made: more can't be had of it later.
    """
    names = [preview_name(i, frame) for i in indices for frame in range(frames)]
    return [str(store.folder / name) for name in names if (store.folder / name).is_file()]
