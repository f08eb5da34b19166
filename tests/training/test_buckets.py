"""A run on aspect-ratio buckets: shape, conditions and shift of each batch; cache and resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import forked_ranks, status_of
from support.resume import cut_off, differences, everything
from support.runs import build_trainer, fingerprint, teacher_dir
from support.samples import SHAPES, sized_folder

from stepdistill.data.images import ImageFolderDataset
from stepdistill.storage.shard_files import Shard
from stepdistill.training.checks import buckets_fit


def images(folder: Path, count: tuple[int, ...] = (5, 4, 2)) -> ImageFolderDataset:
    shapes = [shape for shape, n in zip(SHAPES, count, strict=True) for _ in range(n)]
    data = ImageFolderDataset(sized_folder(folder, shapes), None)
    data.by_ratio = True
    return data


def run(case: str, teacher: Path, data: Any, out: Path, **options: Any) -> Any:
    options = {"max_train_steps": 4, "train_batch_size": 2, **options}
    return build_trainer(case, teacher, "lora", out, dataset=data, **options)


@pytest.mark.full
def test_a_run_is_resumed_exactly_with_and_without_the_cache(tmp_path, tmp_path_factory) -> None:
    """Two micro-batches an update, of shapes of their own; cached latents keep their bucket's."""
    teacher, data = teacher_dir("sd_v", tmp_path_factory), images(tmp_path / "in")
    options = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    whole = run("lcm", teacher, data, tmp_path / "whole", **options)
    whole.train()
    cut_off(run("lcm", teacher, data, tmp_path / "cut", **options), 3)
    options |= {"resume_from_checkpoint": "latest", "cache_dir": str(tmp_path / "cache")}
    again = run("lcm", teacher, data, tmp_path / "cut", **options)
    again.train()
    assert differences(everything(whole), everything(again)) == []
    latents = again.batches.disk.latents
    assert len(latents) == 11
    sizes = {tuple(shape) for shard in latents._paths for shape in _shapes(shard)}
    own = {again.feed.dataset.size_of(i) for i in range(11)}
    assert sizes == {again.family.sample_shape(*size) for size in own}
    assert len(sizes) == 3


def _watched(out: Path, facts: dict[str, Any], *args: Any, **options: Any) -> Any:
    """A run whose facts gain the shapes of its micro-batches, one by one."""
    trainer, shapes = run(*args, out, **options), facts.setdefault(out.name, [])
    forward = trainer.module.forward

    def noted(loss: Any, batch: Any, ctx: Any) -> Any:
        shapes.append([batch.bsz, *batch.shape])
        return forward(loss, batch, ctx)

    trainer.module.forward = noted
    return trainer


def _whole_and_cut(teacher: Path, data: Any, out: Path, world: int) -> dict[str, Any]:
    """Of a run that nobody touches, and one that is cut off within its fourth update."""
    facts: dict[str, Any] = {}
    whole = _watched(out / "whole", facts, "lcm", teacher, data, **_options(world))
    whole.train()
    cut_off(_watched(out / "cut", facts, "lcm", teacher, data, **_options(world)), 3)
    return facts | {"steps": whole.step, "logs": everything(whole)["logs"], "end": _end(whole)}


def _resumed(teacher: Path, data: Any, out: Path, world: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    options = {**_options(world), "resume_from_checkpoint": "latest"}
    again = _watched(out / "cut", facts, "lcm", teacher, data, **options)
    again.train()
    return facts | {"steps": again.step, "logs": everything(again)["logs"], "end": _end(again)}


def _options(world: int) -> dict[str, Any]:
    options = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1, "ema_decay": 0.9}
    return {**options, "train_batch_size": 2 // world}


def _end(trainer: Any) -> Any:
    """Processes, and hashes of weights and optimiser state."""
    states = {k: v for k, v in everything(trainer).items() if isinstance(v, torch.Tensor)}
    return [trainer.accelerator.num_processes, fingerprint(states)]


@pytest.mark.full
def test_two_processes_have_batches_of_one_shape_and_resume_exactly(
    tmp_path, tmp_path_factory
) -> None:
    """As one process with the same global batch has them, step by step; gloo."""
    teacher, data = teacher_dir("sd_v", tmp_path_factory), images(tmp_path / "in")
    seen = {}
    for name, work in (("begun", _whole_and_cut), ("resumed", _resumed)):
        out = tmp_path / name
        out.mkdir()

        def ranked(rank: int, work: Any = work, out: Path = out) -> None:
            facts = work(teacher, data, tmp_path / "two", 2)
            (out / f"{rank}.json").write_text(json.dumps(facts))

        statuses = [status_of(child) for child in forked_ranks(2, ranked, out)]
        assert statuses == [0, 0], (out / "rank0.txt").read_text()[-3000:]
        first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        seen[name] = first
    begun, resumed = seen["begun"], seen["resumed"]
    assert begun["end"] == resumed["end"]
    assert begun["end"][0] == 2
    assert begun["logs"] == resumed["logs"]
    assert (begun["steps"], resumed["steps"]) == (4, 4)
    one = _whole_and_cut(teacher, data, tmp_path / "one", 1)
    assert {size for size, *_ in begun["whole"]} == {1}  # of a global batch of two
    assert [shape for _, *shape in begun["whole"]] == [shape for _, *shape in one["whole"]]
    assert len({tuple(shape) for shape in begun["whole"]}) == 3
    assert begun["cut"] == begun["whole"][: len(begun["cut"])]
    assert resumed["cut"] == begun["whole"][-len(resumed["cut"]) :]
    for mine, theirs in zip(begun["logs"], one["logs"], strict=True):
        assert mine["loss/student"] == pytest.approx(theirs["loss/student"], rel=1e-4)


def _shapes(path: Path) -> list[tuple[int, ...]]:
    return [shape for name, (_, shape) in Shard(path).layout.items() if name == "value.x0"]


@pytest.mark.full
def test_a_discriminator_compares_images_of_one_shape(tmp_path, tmp_path_factory) -> None:
    """The student's sample that the critic takes over is one of the batch's own shape."""
    teacher, data = teacher_dir("sd_v", tmp_path_factory), images(tmp_path / "in")
    trainer = run("dmd2_gan", teacher, data, tmp_path / "run", gradient_accumulation_steps=2)
    seen, judged, step = set(), [], trainer.module.forward

    def noted(loss: Any, batch: Any, ctx: Any) -> Any:
        seen.add(batch.shape)
        found = step(loss, batch, ctx)
        judged.append({tuple(s.x0.shape[1:]) for s in ctx.carry.values()} <= {batch.shape})
        return found

    trainer.module.forward = noted
    trainer.train()
    assert len(seen) == 3
    assert all(judged)


def test_size_conditions_are_those_of_the_shape(make_family) -> None:
    """SDXL: original size, crop corner and target size of the bucket, in px."""
    family = make_family("sdxl")
    cond = family.encode(["a", "b"])
    shape = family.sample_shape(12, 24)
    told = family.added_conditions(torch.zeros(2, *shape), cond, torch.float32)
    assert told["time_ids"].tolist() == [[12, 24, 0, 0, 12, 24]] * 2


@pytest.mark.full
def test_the_shift_is_that_of_the_shape(tmp_path, tmp_path_factory) -> None:
    """Flux tells its scheduler mu, linear in the image tokens: 4 tokens 0.5, 16 tokens 1.15."""
    teacher = teacher_dir("flux", tmp_path_factory)
    data = images(tmp_path / "in", (2, 2, 0))
    trainer = run("lcm", teacher, data, tmp_path / "run")
    by_shape, family = trainer.by_shape, trainer.family
    wide = next(s for s in map(trainer.feed.dataset.size_of, range(4)) if s[1] > s[0])
    shape = family.sample_shape(*wide)
    tokens = shape[-1] * shape[-2] // 4
    mu = 0.5 + (1.15 - 0.5) * (tokens - 4) / (16 - 4)
    assert tokens != 16
    assert by_shape.shift(shape) == pytest.approx(math.exp(mu), rel=1e-6)
    assert by_shape.at(family.default_shape) is trainer.method
    other = by_shape.at(shape)
    assert other.setting.shift == by_shape.shift(shape)
    assert not np.allclose(other.grid.starts, trainer.method.grid.starts)
    used = []
    for name, method in (("own", trainer.method), ("other", other)):
        loss = method.loss

        def noted(*args: Any, name: str = name, loss: Any = loss) -> Any:
            used.append((name, args[1].shape))
            return loss(*args)

        method.loss = noted
    trainer.train()
    assert {name for name, _ in used} == {"own", "other"}
    assert all((name == "other") == (seen == shape) for name, seen in used)


@pytest.mark.full
def test_a_damaged_latent_is_encoded_again_within_the_run(tmp_path, tmp_path_factory) -> None:
    teacher, data = teacher_dir("sd_v", tmp_path_factory), images(tmp_path / "in")
    options: dict[str, Any] = {"max_train_steps": 8}
    plain = run("lcm", teacher, data, tmp_path / "plain", **options)
    plain.train()
    options |= {"cache_dir": str(tmp_path / "cache"), "max_cached_latents": 0}
    run("lcm", teacher, data, tmp_path / "fill", **{**options, "max_train_steps": 1}).train()
    for path in (tmp_path / "cache").glob("latents-*/shard-*"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of a hash or a value: the file opens all the same
        path.write_bytes(content)
    cached = run("lcm", teacher, data, tmp_path / "cached", **options)
    with pytest.warns(UserWarning, match="deleted, to be made anew"):
        cached.train()
    assert differences(everything(plain), everything(cached)) == []


def test_models_of_one_size_are_refused_before_a_weight_is_loaded(tmp_path) -> None:
    data = images(tmp_path / "in")
    family = SimpleNamespace(one_size=True, name="dit")
    with pytest.raises(ValueError, match=r"data\.buckets: expected a model of several .* got dit"):
        buckets_fit(data, None, SimpleNamespace(family=family))
    several = SimpleNamespace(family=SimpleNamespace(one_size=False))
    buckets_fit(data, None, several)
    with pytest.raises(ValueError, match=r"data\.buckets: expected no gan_dataset"):
        buckets_fit(data, data, several)
    data.by_ratio = False
    buckets_fit(data, data, SimpleNamespace(family=family))
