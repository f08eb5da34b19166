# Licensed under the Apache License, Version 2.0.
"""Several few-step students on one base, of which a call's prompt picks one (multi-student).

Each student is a LoRA on the folder's denoiser, trained on its share of the prompts or classes. A
call computes one of them: more capacity at the price of one student.
Source: Song et al. 2024 (MSD), arXiv:2410.23274. Adapters in place of whole students are ours.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("path/to/export", trust_remote_code=True)
    image = pipe("a portrait of a man").images[0]         # its steps and guidance are the defaults
    image = pipe("a portrait of a man", student=1).images[0]       # whatever the prompt says

Routing. Text is the mean of the first text encoder's last hidden states over the prompt's tokens,
scaled to length 1; student argmin_k |e - centroid_k|^2 + offset_k computes it, the offsets being
what makes the shares of training equally large. A class label goes to the last student whose first
label is not above it. Centroids stand in students/config.json, as no dtype may round them.

What comes back is the stock pipeline of the folder (its class, offloading, saving), called with one
more argument. Prompts of several students in one call are computed student by student, and come
back in order; one torch.Generator then draws in that order, a list of them image by image.
"""

# Shapes: B prompts, K students, E width of the text, r rank, I inputs, O outputs, *K kernel.

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

_NAME = "multi_student"
_MAX_TOKENS = 128  # where a tokenizer sets fewer (CLIP's 77), those
_PER_PROMPT = ("prompt", "negative_p", "pooled", "class_labels", "generator", "latents", "image")


# -------------------------------------------------------------------- routing
@torch.no_grad()
def embed(pipeline: Any, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """(B, E) float64 on the CPU, rows of length 1: what prompts are told apart by.

    Every prompt is padded to one length, so that no row depends on those beside it.
    """
    tokenizer, encoder = _text_parts(pipeline)
    most = getattr(tokenizer, "tokenizer", tokenizer).model_max_length
    rows = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(
            text=list(prompts[start : start + batch_size]),
            padding="max_length",
            max_length=min(most, _MAX_TOKENS),
            truncation=True,
            return_tensors="pt",
        ).to(pipeline._execution_device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        weight = mask[..., None].double().cpu()
        rows.append((states.double().cpu() * weight).sum(1) / weight.sum(1).clamp_min(1))
    return F.normalize(torch.cat(rows), dim=1)


def _text_parts(pipeline: Any) -> tuple[Any, Any]:
    """(tokenizer, text encoder), the first that the pipeline has."""
    for number in ("", "_2", "_3"):
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if encoder is not None:
            return getattr(pipeline, f"tokenizer{number}"), encoder
    raise ValueError("prompt: expected a text encoder to choose a student by, got none loaded.")


def nearest(points: Tensor, centroids: Tensor, offsets: Tensor) -> Tensor:
    """(B,) index of the centroid of least |e - c|^2 + offset, all in float64.

    Args: points: (B, E); centroids: (K, E); offsets: (K,).
    """
    return (_squares(points, centroids) + offsets).argmin(1)


def block_of(label: int, bounds: Sequence[int]) -> int:
    """The last block whose first label is not above it; the first one for a label below all."""
    return max(sum(int(label) >= first for first in bounds) - 1, 0)


def _squares(points: Tensor, centroids: Tensor) -> Tensor:
    """(B, K) squared distances, one centroid at a time: no row depends on those beside it."""
    return torch.stack([(points - centre).square().sum(1) for centre in centroids], 1)


# ----------------------------------------------------------------- the students
class StudentAdapters(ModelMixin, ConfigMixin):
    """K students' LoRA factors for one network, and the router.

    Args:
        net: the pipeline's part that they change, such as unet.
        modules: name of each adapted module -> shapes of down (r, I, *K) and up (O, r, *1).
        centroids, offsets: (K, E), (K,) of a text router; bounds: K first labels of a class router;
            neither: one student.
        call: the call's defaults, those of training.
    """

    @register_to_config
    def __init__(
        self,
        net: str,
        modules: dict[str, Any],
        num_students: int,
        centroids: list[list[float]] | None = None,
        offsets: list[float] | None = None,
        bounds: list[int] | None = None,
        call: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()

        def empty(which: int) -> nn.ParameterDict:
            return nn.ParameterDict(
                {
                    name.replace(".", "/"): nn.Parameter(
                        torch.zeros(num_students, *shapes[which]), requires_grad=False
                    )
                    for name, shapes in modules.items()
                }
            )

        self.down, self.up = empty(0), empty(1)

    @contextmanager
    def applied(self, net: nn.Module, student: int) -> Iterator[None]:
        """Within: the network computes as that student; its weights are left alone."""
        hooks = []
        try:
            for name in self.config.modules:
                key = name.replace(".", "/")
                hook = functools.partial(_added, self.down[key][student], self.up[key][student])
                module = net.get_submodule(name)
                hooks.append(module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in hooks:
                handle.remove()


def _added(
    down: Tensor, up: Tensor, module: Any, args: tuple[Any, ...], named: dict[str, Any], out: Tensor
) -> Tensor:
    """The module's output plus up(down(input))."""
    x = (args[0] if args else named["input"]).to(down.dtype)
    down, up = down.to(x.device), up.to(x.device)
    if down.ndim == 2:
        made = F.linear(F.linear(x, down), up)
    else:
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[down.ndim]
        place = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        made = conv(conv(x, down, **place), up)
    return out + made.to(out.dtype)


# ----------------------------------------------------------------- the pipeline
class _Routed:
    """What is laid over a stock pipeline class."""

    def students_of(self: Any, subject: Any) -> list[int]:
        """The student of each prompt or class label."""
        router = self.students.config
        rows = [subject] if isinstance(subject, (str, int)) else list(subject)
        if router.num_students == 1:
            return [0] * len(rows)
        if router.bounds is not None:
            return [block_of(label, router.bounds) for label in rows]
        centroids = torch.tensor(router.centroids, dtype=torch.float64)
        offsets = torch.tensor(router.offsets, dtype=torch.float64)
        return nearest(embed(self, rows), centroids, offsets).tolist()

    @torch.no_grad()
    def __call__(self: Any, *args: Any, student: int | None = None, **kwargs: Any) -> Any:
        """The stock call, its steps and guidance those of training, by the prompt's student.

        Args: student: its number, in place of the router's.
        Errors: ValueError for a number that is none, or nothing to route by.
        """
        stock, students = super().__call__, self.students
        given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
        given = {**(students.config.call or {}), **given, **given.pop("kwargs", {})}
        count, net = students.config.num_students, getattr(self, students.config.net)
        name = "class_labels" if "class_labels" in inspect.signature(stock).parameters else "prompt"
        subject = given.get(name)
        if student is not None and not 0 <= student < count:
            raise ValueError(f"student: expected a number from 0 to {count - 1}, got {student}.")
        if student is None and subject is None:
            raise ValueError(
                f"{name}: expected one to choose a student by, got none. Give it, or student=0 "
                f"to {count - 1}."
            )
        choices = [student] if student is not None else self.students_of(subject)
        if len(set(choices)) == 1:
            with students.applied(net, choices[0]):
                return stock(**given)
        per_prompt = given.get("num_images_per_prompt") or given.get("num_videos_per_prompt") or 1
        results, order = [], []
        for each in sorted(set(choices)):
            rows = [row for row, choice in enumerate(choices) if choice == each]
            with students.applied(net, each):
                results.append(stock(**_part(given, rows, len(choices))))
            order += [row * per_prompt + i for row in rows for i in range(per_prompt)]
        places = sorted(range(len(order)), key=order.__getitem__)
        if isinstance(results[0], tuple):
            return tuple(_joined(values, places) for values in zip(*results, strict=True))
        names = [field.name for field in dataclasses.fields(results[0])]
        joined = [_joined([getattr(made, name) for made in results], places) for name in names]
        return type(results[0])(*joined)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The stock method's folder, with this file in it, which its model_index.json names."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index |= {
            "_class_name": [_NAME, MultiStudentPipeline.__name__],
            "stock_class": type(self).__name__,
            "students": [_NAME, StudentAdapters.__name__],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for place in (folder, folder / "students"):
            shutil.copyfile(__file__, place / f"{_NAME}.py")


def _part(given: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The call's arguments for these of its `count` prompts."""
    part = {}
    for name, value in given.items():
        listed = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        if name.startswith(_PER_PROMPT) and listed and len(value) % count == 0:
            each = len(value) // count
            places = [row * each + i for row in rows for i in range(each)]
            value = [value[i] for i in places] if isinstance(value, list) else value[places]
        part[name] = value
    return part


def _joined(parts: Sequence[Any], places: list[int]) -> Any:
    """One field of several results in the prompts' order."""
    if parts[0] is None or isinstance(parts[0], bool):
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[places]
    if isinstance(parts[0], list):
        whole = [row for part in parts for row in part]
        return [whole[place] for place in places]
    return torch.cat([torch.from_numpy(part) for part in parts])[places].numpy()


@functools.cache
def _over(name: str) -> Any:
    """The stock class of that name with the router laid over it, under the stock name."""
    stock = getattr(diffusers, name)

    def init(self: Any, students: StudentAdapters, **parts: Any) -> None:
        stock.__init__(self, **parts)
        self.register_modules(students=students)

    takes = [*inspect.signature(stock.__init__).parameters.values()]
    own = inspect.Parameter("students", inspect.Parameter.KEYWORD_ONLY)
    init.__signature__ = inspect.Signature([*takes, own])  # type: ignore[attr-defined]
    return type(name, (_Routed, stock), {"__init__": init})


def routed(pipeline: Any, students: StudentAdapters) -> Any:
    """A stock pipeline in memory with these students; its parts are shared, not copied."""
    init = inspect.signature(type(pipeline).__init__).parameters
    parts = {
        name: getattr(pipeline, name, None)
        if name in pipeline.components
        else pipeline.config[name]
        for name in init
        if name in pipeline.components or name in pipeline.config
    }
    return _over(type(pipeline).__name__)(students=students, **parts)


class MultiStudentPipeline(DiffusionPipeline):
    """What model_index.json names; making one gives the folder's own class with the router."""

    _optional_components: ClassVar[list[str]] = [
        "scheduler",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "unet",
        "transformer",
        "transformer_2",
        "image_encoder",
        "image_processor",
        "feature_extractor",
        "safety_checker",
        "condition_encoder",
        "projection_model",
        "audio_tokenizer",
        "audio_token_detokenizer",
    ]

    def __new__(cls, students: Any, stock_class: str, **parts: Any) -> Any:
        made = _over(stock_class)
        takes = inspect.signature(made.__init__).parameters
        foreign = [key for key, part in parts.items() if key not in takes and part is not None]
        if foreign:
            raise ValueError(f"{stock_class}: expected its own parts only, got also {foreign}.")
        given = {key: part for key, part in parts.items() if key in takes}
        return made(students=students, **given)

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        text_encoder_2,
        text_encoder_3,
        tokenizer,
        tokenizer_2,
        tokenizer_3,
        unet,
        transformer,
        transformer_2,
        image_encoder,
        image_processor,
        feature_extractor,
        safety_checker,
        condition_encoder,
        projection_model,
        audio_tokenizer,
        audio_token_detokenizer,
        students,
        stock_class=None,
        id2label=None,
        requires_safety_checker=None,
        force_zeros_for_empty_prompt=None,
        is_distilled=None,
        boundary_ratio=None,
        expand_timesteps=None,
    ) -> None:
        """Never run: it tells Diffusers which parts a folder may hold. See __new__."""
