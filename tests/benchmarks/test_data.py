"""Memory of data at scale, each figure in a process of its own, and tars' speed. Prints tables.

    pytest -m benchmark -n 0 -s tests/benchmarks/test_data.py

Growth of resident memory from before a set is opened to after 2000 batches of 16, over a
shuffled epoch's beginning: prompt files read by offsets against a list of their lines, and a cache
of embeddings read by key.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

pytestmark = pytest.mark.benchmark

_MEASURE = """
import sys, warnings
from itertools import islice
from pathlib import Path
import numpy as np, torch
from stepdistill.cache.tensors import TensorCache, content_key
from stepdistill.data.stream import PromptDataset, stream

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    shared = int(Path("/proc/self/statm").read_text().split()[2])
    return (pages - shared) * 4096  # mapped files are the kernel's to drop

kind, path = sys.argv[1], Path(sys.argv[2])
torch.randperm(1000)
list(islice(stream(PromptDataset(["a"] * 100), 16, 0), 3))
before = resident()
if kind == "cache":
    cache = TensorCache(path)
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(cache), 32_000):
        cache.get(content_key(int(i)))
elif kind in ("paths", "packed"):
    from stepdistill.data.paths import PackedPaths
    names = ((f"{i % 1000}/ILSVRC2012_val_{i:08d}.JPEG", i % 1000) for i in range(1_000_000))
    held = PackedPaths(path, names) if kind == "packed" else [(path / n, k) for n, k in names]
    for i in np.random.default_rng(0).integers(0, len(held), 32_000):
        assert held[int(i)][0].suffix == ".JPEG"
else:
    data = PromptDataset(path.read_text().splitlines()) if kind == "list" else (
        PromptDataset.from_file(path))
    for raw in islice(stream(data, 16, 0), 2000):
        assert len(raw["prompt"]) == 16
print(resident() - before, resident())
"""


def measured(kind: str, path: Path) -> tuple[float, float]:
    """MB that a fresh process grows by, and that it has then."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, kind, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, total = done.stdout.split()
    return int(grown) / 1e6, int(total) / 1e6


def prompts(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.writelines(f"a picture of thing {i}, " + "x" * 80 + "\n" for i in range(count))
    return path


def test_prompts_stream_in_constant_memory(tmp_path) -> None:
    few, many = (prompts(tmp_path / f"{n}.txt", n) for n in (10_000, 1_000_000))
    (small, one), (large, two) = measured("file", few), measured("file", many)
    listed, _ = measured("list", many)
    table = Table("what", "MB", title="2000 batches of 16 prompts: growth of resident memory")
    table.add_row("10,000 prompts, by offsets", f"{small:.1f}")
    table.add_row("1,000,000 prompts, by offsets", f"{large:.1f}")
    table.add_row("1,000,000 prompts, as a list", f"{listed:.1f}")
    table.add_row("1,000,000 prompts, the file itself", f"{many.stat().st_size / 1e6:.1f}")
    table.add_row("the process, 1M / 10k, by offsets", f"{two / one:.3f}")
    table.add_row("growth at 1M, by offsets / list", f"{large / listed:.3f}")
    Console().print(table)
    assert large < 0.1 * listed
    assert two < 1.05 * one
    assert large < 12  # 0.1 of offsets, 2 of the window's numbers, and what its making took


def test_paths_of_a_million_images_are_packed(tmp_path) -> None:
    (packed, _), (listed, _) = (measured(kind, tmp_path) for kind in ("packed", "paths"))
    table = Table("what", "MB", title="1,000,000 labelled image paths: growth of resident memory")
    table.add_row("packed", f"{packed:.1f}")
    table.add_row("as a list of paths", f"{listed:.1f}")
    Console().print(table)
    assert packed < 80  # 33 bytes of a name, 12 of where it ends and its label, and room to grow
    assert packed < 0.2 * listed


def test_a_cache_is_read_in_the_memory_of_its_keys(tmp_path) -> None:
    import torch

    from stepdistill.cache.tensors import CacheWriter, TensorCache, content_key

    sizes = {}
    for count in (2_000, 40_000):
        writer = CacheWriter(TensorCache(tmp_path / str(count)), 16 << 20)
        for i in range(count):
            writer.add(content_key(i), {"embeds": torch.full((8, 256), float(i))})
        writer.flush()
        sizes[count], _ = measured("cache", tmp_path / str(count))
    whole = sum(p.stat().st_size for p in (tmp_path / "40000").iterdir()) / 1e6
    table = Table("what", "MB", title="32,000 rows of 8 kB read by key: growth of private memory")
    for count, size in sizes.items():
        table.add_row(f"{count:,} rows on disk", f"{size:.1f}")
    table.add_row("40,000 rows, the files themselves", f"{whole:.1f}")
    Console().print(table)
    assert sizes[40_000] < 0.1 * whole


def test_tars_by_offset_against_the_library(tmp_path) -> None:
    """Undecoded samples of one epoch, in one process: shuffled by offset, and from end to end."""
    import webdataset

    from stepdistill.data.tars import TarDataset

    image, count = bytes(range(256)) * 200, 1_000  # 50 kB, as a small JPEG
    for shard in range(8):
        with webdataset.TarWriter(str(tmp_path / f"{shard:04d}.tar")) as tar:
            for i in range(count):
                tar.write({"__key__": f"{shard}-{i}", "jpg": image, "txt": "a caption"})
    began = time.perf_counter()
    data = TarDataset(str(tmp_path), None, window=4096)
    opened = time.perf_counter() - began
    order, urls = data.order(0), [str(path) for path in data.shards]

    def ours() -> int:
        rows = [order[i] for i in range(len(data))]
        return sum(len(data.image_bytes(i)[0]) + len(data.condition(i)["prompt"]) for i in rows)

    def theirs() -> int:
        rows = webdataset.WebDataset(urls, shardshuffle=False)
        return sum(len(row["jpg"]) + len(row["txt"]) for row in rows)

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3):
        for name, read in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            assert read() == len(data) * (len(image) + len("a caption"))
            seconds[name].append(time.perf_counter() - began)
    best = {name: min(times) for name, times in seconds.items()}
    table = Table("what", "ratio", title="8,000 samples of 50 kB in 8 tar shards, undecoded")
    table.add_row("an epoch, shuffled by offset / webdataset's from end to end",
                  f"{best['ours'] / best['theirs']:.2f}")  # fmt: skip
    table.add_row("making the index / webdataset's epoch", f"{opened / best['theirs']:.2f}")
    Console().print(table)
    assert best["ours"] < best["theirs"]
