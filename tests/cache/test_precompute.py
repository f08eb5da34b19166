"""The cache of prompts and latents: what it is keyed by, filling it, and training from it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from support.faults import fork, status_of
from support.processes import forked_ranks
from support.runs import fingerprint, teacher_dir
from support.samples import COUNT, caption, dataset_of, image_folder, png

from stepdistill import ConsistencyTrainer, DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.cache.encoded import EncodedCache, encoder_facts
from stepdistill.cache.precompute import fill, prepare_cache
from stepdistill.cli import main
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset, stream
from stepdistill.families.registry import load_family
from stepdistill.training.batches import BatchMaker

CPU = torch.device("cpu")
PROMPTS = [f"a picture of thing {i}" for i in range(40)]
RESOLUTION = 32


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture
def family(teacher):
    return load_family(teacher)


def silent(_text: str) -> None:
    pass


def open_and_fill(folder: Path, family: Any, data: Any, **options: Any) -> EncodedCache:
    cache = EncodedCache(folder, family, None)
    fill(cache, data, CPU, options.pop("shard_bytes", 1 << 20), say=silent, **options)
    cache.reopen()
    return cache


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


# ------------------------------------------------------------------ what it holds
@pytest.mark.full
def test_prompts_are_the_encoder_s_bits(family, tmp_path) -> None:
    cache = open_and_fill(tmp_path, family, PromptDataset(PROMPTS))
    for prompt in PROMPTS[:5]:
        found, fresh = cache.prompt(prompt), family.encode([prompt])
        assert found is not None
        assert fingerprint(found.tensors) == fingerprint(fresh.tensors)


def test_every_caption_of_a_list_is_there(family, tmp_path) -> None:
    """Whichever is drawn later."""
    told = [["a", "b"], "c", ["a", "d", "e"]]
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(told)]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(rows))
    for name, data in (
        ("p", PromptDataset(told)),
        ("i", ImageFolderDataset(tmp_path / "in", RESOLUTION)),
    ):
        cache = open_and_fill(tmp_path / name, family, data)
        assert len(cache.prompts or ()) == 5
        assert all(cache.prompt(text) is not None for text in "abcde")


def test_latents_are_the_autoencoder_s_bits(family, tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path / "images"), RESOLUTION)
    cache = open_and_fill(tmp_path / "cache", family, data)
    assert cache.latents is not None
    assert len(cache.latents) == COUNT
    made = [BatchMaker(family, CPU, disk=disk) for disk in (cache, None)]
    raws = [next(stream(data, 3, 0)) for _ in made]
    latents = [maker(raw).x0 for maker, raw in zip(made, raws, strict=True)]
    assert torch.equal(latents[0], latents[1])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tars", "rows", "stream"])
def test_every_source_fills_it(family, tmp_path, kind) -> None:
    data = dataset_of(kind, tmp_path, bad=(4,))
    data.size_px = RESOLUTION
    with pytest.warns(UserWarning, match="can't be read"):
        cache = open_and_fill(tmp_path / "cache", family, data)
    assert cache.latents is not None
    assert cache.prompts is not None
    assert len(cache.latents) == COUNT - 1
    # A tar's and a row's caption can be read without its image; a stream's row is one thing.
    assert len(cache.prompts) == COUNT - (kind == "stream")


def test_tensors_of_the_user_s_own_dataset(family, tmp_path) -> None:
    images = torch.rand(4, 3, RESOLUTION, RESOLUTION) * 2 - 1
    data = [{"prompt": caption(i % 2), "image": images[i % 3]} for i in range(4)]

    class Own:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return data[index]

    cache = open_and_fill(tmp_path, family, Own())
    assert (len(cache.prompts or ()), len(cache.latents or ())) == (2, 3)
    batch = BatchMaker(family, CPU, disk=cache)(next(stream(Own(), 4, 0)))
    fresh = BatchMaker(family, CPU)(next(stream(Own(), 4, 0)))
    assert torch.equal(batch.x0, fresh.x0)


def test_class_labels_leave_latents_alone(make_family, tmp_path) -> None:
    family, folder = make_family("dit"), tmp_path / "images"
    for label in (0, 2):
        image_folder(folder / str(label), count=3)
    data = ImageFolderDataset(folder, RESOLUTION, labels=True)
    cache = open_and_fill(tmp_path / "cache", family, data)
    assert cache.prompts is None
    assert len(cache.latents or ()) == 3  # three different images under two labels
    raw = next(stream(data, 6, 0))
    batch, fresh = (BatchMaker(family, CPU, disk=disk)(raw) for disk in (cache, None))
    assert batch.x0 is not None
    assert fresh.x0 is not None
    assert torch.equal(batch.x0, fresh.x0)


# ------------------------------------------------------------------- who made it
def test_another_encoder_has_another_folder(family, teacher, tmp_path) -> None:
    EncodedCache(tmp_path, family, None)
    EncodedCache(tmp_path, load_family(teacher), None)
    assert len(list(tmp_path.iterdir())) == 2  # prompts and latents
    with torch.no_grad():
        next(family.pipeline.text_encoder.parameters()).view(-1)[0] += 1e-3
    EncodedCache(tmp_path, family, None)
    assert sorted(p.name.split("-")[0] for p in tmp_path.iterdir()) == [
        "latents", "prompts", "prompts"]  # fmt: skip
    with torch.no_grad():
        next(family.pipeline.vae.parameters()).view(-1)[0] += 1e-3
    EncodedCache(tmp_path, family, None)
    assert len(list(tmp_path.iterdir())) == 4
    EncodedCache(tmp_path, family.__class__(family.pipeline), 64)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("name", ["sd_v", "sdxl", "sd3", "flux", "sana", "lumina2", "qwen_image"])
def test_using_an_encoder_does_not_change_its_name(make_family, name) -> None:
    family = make_family(name)
    before = encoder_facts(family, None, False)
    family.encode(["a", "a cat"])
    family.null(1)
    assert encoder_facts(family, None, False) == before
    assert "text_encoder" in before["parts"]
    assert "tokenizer" in before["parts"]


# -------------------------------------------------------------------- filling it
@pytest.mark.full
def test_ranks_share_the_keys(family, tmp_path) -> None:
    data = PromptDataset(PROMPTS * 2)
    parts = []
    for rank in (0, 1):
        before = set(files(tmp_path))
        open_and_fill(tmp_path, family, data, rank=rank, world_size=2, shard_bytes=4000)
        parts.append(set(files(tmp_path)) - before)
    cache = EncodedCache(tmp_path, family, None)
    assert len(cache.prompts or ()) == len(PROMPTS)
    assert all(cache.prompt(text) is not None for text in PROMPTS)
    assert min(len(part) for part in parts) > 3


def shards(folder: Path) -> int:
    return len(list(folder.glob("*/shard-*.safetensors")))


def runs(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@pytest.mark.full
@pytest.mark.parametrize("tries", [6, pytest.param(50, marks=pytest.mark.full)])
def test_kills_cost_the_shard_in_work(family, tmp_path, tries) -> None:
    """Killed again and again while it is filled, it becomes the very files of a quiet fill."""
    data = ImageFolderDataset(image_folder(tmp_path / "images", count=60), RESOLUTION)
    size = 3000
    open_and_fill(tmp_path / "whole", family, data, shard_bytes=size)
    whole, killed = files(tmp_path / "whole"), tmp_path / "killed"
    chance, before, cut = random.Random(0), 0, 0
    EncodedCache(killed, family, None)
    for _ in range(tries):
        child = fork(lambda: open_and_fill(killed, family, data, shard_bytes=size) and None)
        wanted = shards(killed) + chance.randrange(2)
        deadline = time.monotonic() + 60
        while shards(killed) < wanted and runs(child) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        cut += status_of(child) == -signal.SIGKILL
        found = EncodedCache(killed, family, None)  # opens without a warning
        rows = len(found.prompts or ()) + len(found.latents or ())
        assert rows >= before
        before = rows
    assert cut >= 5
    open_and_fill(killed, family, data, shard_bytes=size)
    assert len(whole) > 30
    assert files(killed) == whole


def test_forecast_is_said_and_right(make_family, tmp_path) -> None:
    family, said = make_family("sd_v"), list[str]()
    cache = EncodedCache(tmp_path, family, None)
    fill(cache, PromptDataset([*PROMPTS, *PROMPTS[:7]]), CPU, 1 << 20, say=said.append)
    (path,) = tmp_path.rglob("shard-*.safetensors")
    one = family.encode(PROMPTS[:1]).tensors.values()
    size = 16 + 16 + sum(x.numel() * x.element_size() for x in one)
    assert f"0 prompts there, 40 to encode x {size / 1024:.1f} KiB" in said[0]
    assert 0 <= path.stat().st_size - 40 * size < 1000
    fill(cache, PromptDataset(PROMPTS), CPU, 1 << 20, say=said.append)
    assert "40 prompts there, 0 to encode x 0.0 B" in said[2]


@pytest.mark.full
def test_forecast_of_images_sees_what_is_there(family, tmp_path) -> None:
    half = ImageFolderDataset(image_folder(tmp_path / "half", count=12), RESOLUTION)
    data = ImageFolderDataset(image_folder(tmp_path / "all"), RESOLUTION)
    open_and_fill(tmp_path / "cache", family, half)
    said: list[str] = []
    fill(EncodedCache(tmp_path / "cache", family, None), data, CPU, 1 << 20, say=said.append)
    assert "12 images there, 12 to encode" in said[1]


def test_too_little_room_is_said_first(family, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ValueError, match=r"cache_dir: expected \d.* free in .*, got 1000\.0 B"):
        open_and_fill(tmp_path, family, PromptDataset(PROMPTS))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_encodings_that_are_not_finite_are_refused(family, tmp_path) -> None:
    with torch.no_grad():
        next(family.pipeline.text_encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"expected finite encodings of prompts.*thing 0"):
        open_and_fill(tmp_path, family, PromptDataset(PROMPTS))
    assert not list(tmp_path.rglob("*.safetensors"))


class Watched(ImageFolderDataset):
    """Counts how often an image's bytes are read."""

    reads = 0

    def image_bytes(self, index: int) -> tuple[bytes, str]:
        type(self).reads += 1
        return super().image_bytes(index)


@pytest.mark.full
def test_a_set_gone_through_is_not_read_again(family, tmp_path) -> None:
    state, reads = PartialState(cpu=True), []
    for name, size in (("a", 16), ("a", 16), ("b", 16), ("a", 32), ("a", 16)):
        folder = tmp_path / name
        data = Watched(image_folder(folder, count=12 if name == "a" else 9), size)
        args = TrainConfig(cache_dir=str(tmp_path / "c"), resolution=size)
        Watched.reads = 0
        cache = EncodedCache(tmp_path / "c", family, size)
        rest = prepare_cache(cache, data, args, state)
        reads.append(Watched.reads > 0)
        assert rest[0].keys() == {"prompt", "content"}
        assert data[0].keys() == {"prompt", "content", "image"}
    assert reads == [True, False, True, True, False]
    gone = next((tmp_path / "c").glob("latents-*/shard-*"))
    gone.unlink()
    prepare_cache(cache := EncodedCache(tmp_path / "c", family, 16), data, args, state)
    assert len(cache.latents or ()) >= 12


# ------------------------------------------------------------------ training from it
def options(out: Path, **more: Any) -> TrainConfig:
    base = {"max_train_steps": 2, "train_batch_size": 2, "disable_progress_bar": True}
    return TrainConfig(output_dir=str(out), tuning=Tuning(rank=2), **{**base, **more})


@pytest.mark.full
def test_training_from_it_is_training_without(teacher, tmp_path, monkeypatch) -> None:
    data = ImageFolderDataset(image_folder(tmp_path / "images"), RESOLUTION)
    runs = []
    for name, more in (("plain", {}), ("cached", {"cache_dir": str(tmp_path / "cache")})):
        trainer = ConsistencyTrainer(teacher, options(tmp_path / name, **more), data)
        trainer.train()
        runs.append(fingerprint(trainer.bank.members("student")))
    assert runs[0] == runs[1]

    def refuse(*_args: Any) -> None:
        raise AssertionError("encoded or decoded again")

    more = {"cache_dir": str(tmp_path / "cache"), "dataloader_num_workers": 2}
    trainer = ConsistencyTrainer(teacher, options(tmp_path / "again", **more), data)
    null = trainer.family.null(1)
    monkeypatch.setattr(trainer.family, "null", lambda bsz: null)
    monkeypatch.setattr(trainer.family, "encode", refuse)
    monkeypatch.setattr(trainer.family, "latents", refuse)
    trainer.train()
    assert fingerprint(trainer.bank.members("student")) == runs[0]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:data:UserWarning")
def test_resume_in_an_epoch_with_workers_and_cache(teacher, tmp_path) -> None:
    """24 tar samples, two unreadable, in batches of 2, taken up after 3 updates of 6."""
    data = dataset_of("tars", tmp_path, bad=(4, 11))
    data.size_px = RESOLUTION
    more = {"dataloader_num_workers": 2, "checkpointing_steps": 3}
    more |= {"max_train_steps": 6, "logging_steps": 1}
    whole = ConsistencyTrainer(teacher, options(tmp_path / "run", **more), data)
    whole.train()
    back = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3"), **more}
    back["cache_dir"] = str(tmp_path / "cache")
    resumed = ConsistencyTrainer(teacher, options(tmp_path / "run", **back), data)
    resumed.train()
    assert whole.step == resumed.step == 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(row["student/unreadable"] * 2 for row in rows) == whole.feed.corrupt.replaced > 0
    members = [fingerprint(t.bank.members("student")) for t in (whole, resumed)]
    assert members[0] == members[1]


@pytest.mark.full
def test_latents_in_memory_are_bounded(family, tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path), RESOLUTION)
    maker, calls = BatchMaker(family, CPU, max_cached_latents=10), 0
    encode = family.latents

    def counted(image: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return encode(image)

    family.latents = counted
    batches = stream(data, 2, 0)
    for _ in range(COUNT // 2):
        maker(next(batches))
    assert (calls, len(maker._latents)) == (COUNT, 10)


@pytest.mark.full
def test_latents_in_memory_count_bytes(family, tmp_path) -> None:
    """Many small ones fit where a few large ones do; a budget of three holds three."""
    data = ImageFolderDataset(image_folder(tmp_path), RESOLUTION)
    each = 4 * prod(family.sample_shape(RESOLUTION, RESOLUTION))
    maker = BatchMaker(family, CPU, RESOLUTION, latents_cache_bytes=3 * each + 1)
    batches = stream(data, 2, 0)
    for _ in range(COUNT // 2):
        maker(next(batches))
    assert (len(maker._latents), maker._latents_size, maker.latents_kept) == (3, 3 * each, 3)
    assert BatchMaker(family, CPU, RESOLUTION).latents_kept == (2 << 30) // each > 10_000


def test_corrupt_samples_end_a_run_where_none_are_allowed(teacher, tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path / "images", bad=range(12)), RESOLUTION)
    args = options(tmp_path / "run", max_corrupt_fraction=0.0, train_batch_size=8)
    trainer = ConsistencyTrainer(teacher, args, data)
    with (
        pytest.warns(UserWarning, match="can't be read"),
        pytest.raises(ValueError, match="max_corrupt_fraction"),
    ):
        trainer.train()


# ------------------------------------------------------------------------ command
@pytest.mark.full
def test_command_fills_what_the_run_then_finds(teacher, tmp_path, capsys) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    flags = ["--pretrained_model_name_or_path", str(teacher), "--cache_dir", str(tmp_path / "c")]
    flags += ["--data.prompts_file", str(tmp_path / "p.txt")]
    main(["cache", *flags])
    assert "0 prompts there, 40 to encode" in capsys.readouterr().out
    before = files(tmp_path / "c")
    data = PromptDataset.from_file(tmp_path / "p.txt")
    args = options(tmp_path / "run", cache_dir=str(tmp_path / "c"))
    DistributionMatchingTrainer(teacher, args, data).train()
    assert "has these data already" in capsys.readouterr().out
    assert files(tmp_path / "c") == before


@pytest.mark.full
def test_command_opens_no_file_of_the_denoiser(teacher, tmp_path) -> None:
    """There is none, and the cache is the one that is made with it."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    shutil.copytree(teacher, tmp_path / "model")
    for path in (tmp_path / "model" / "transformer").glob("*.safetensors"):
        path.unlink()
    for name, model in (("with", teacher), ("without", tmp_path / "model")):
        flags = ["--pretrained_model_name_or_path", str(model), "--data.prompts_file"]
        main(["cache", *flags, str(tmp_path / "p.txt"), "--cache_dir", str(tmp_path / name)])
    assert len(files(tmp_path / "with")) > 1
    assert files(tmp_path / "with") == files(tmp_path / "without")


def test_command_without_a_folder(teacher, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(SystemExit, match="expected --cache_dir"):
        main(["cache", "--pretrained_model_name_or_path", str(teacher),
              "--data.prompts_file", str(tmp_path / "p.txt")])  # fmt: skip


@pytest.mark.full
def test_command_shares_the_work_among_processes(teacher, tmp_path) -> None:
    """Two processes write what one would, each its own keys, and a second call finds it all."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    flags = ["--pretrained_model_name_or_path", str(teacher)]
    flags += ["--data.prompts_file", str(tmp_path / "p.txt"), "--cache_dir"]
    main(["cache", *flags, str(tmp_path / "one")])
    said = []
    for out in (tmp_path / "first", tmp_path / "second"):
        out.mkdir()
        ranks = forked_ranks(2, lambda _: main(["cache", *flags, str(tmp_path / "two")]), out)
        assert [status_of(rank) for rank in ranks] == [0, 0], (out / "rank0.txt").read_text()
        said.append((out / "rank0.txt").read_text())
    assert "40 to encode" in said[0]
    assert "has these data already" in said[1]
    family = load_family(teacher)
    one, two = (EncodedCache(tmp_path / name, family, None) for name in ("one", "two"))
    assert len(list((tmp_path / "two").glob("prompts-*/shard-*"))) == 2
    for prompt in PROMPTS:
        a, b = one.prompt(prompt), two.prompt(prompt)
        assert a is not None
        assert b is not None
        assert fingerprint(a.tensors) == fingerprint(b.tensors)


def test_uncached_images_are_encoded_a_megapixel_at_once(make_family) -> None:
    family = make_family("sd")
    images = torch.rand(5, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calls: list[int] = []

    def latents(some: torch.Tensor) -> torch.Tensor:
        calls.append(len(some))
        return some.mean((2, 3), keepdim=True)

    family.latents = latents  # type: ignore[method-assign]
    raw = {"index": list(range(5)), "prompt": ["a"] * 5, "image": images}
    batch = BatchMaker(family, CPU, cache_latents=False)(raw)
    assert calls == [4, 1]
    assert torch.equal(batch.x0, latents(images))
