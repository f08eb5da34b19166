"""Pair sets: exact contents, exact resume, and every way a folder can be wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.core.path import FlowPath, VPPath
from stepdistill.core.solvers import ode_solve
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.pairs.dataset import PairDataset, PairWriter, generate_pairs, pair_noise
from stepdistill.pairs.files import MANIFEST, shard_name
from stepdistill.storage.shard_files import Shard
from stepdistill.testing.analytic import GaussianTeacher

SHAPE = (1, 2, 2)
PROMPTS = ["one", "two", "three, with a comma\nand a line", "четыре"]


def encode(prompts: Sequence[Any]) -> Cond:
    means = [float(len(p)) for p in prompts]
    return Cond({"mean": torch.tensor(means).view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()})


def null(bsz: int) -> Cond:
    return Cond({"mean": torch.zeros(bsz, *SHAPE)})


class Counting(GaussianTeacher):
    calls = 0

    def raw(self, *args: Any) -> Any:
        self.calls += 1
        return super().raw(*args)


def make(folder: Path, num_pairs: int = 10, teacher=None, prompts=PROMPTS, **options: Any) -> Any:
    options = {"shard_size": 4, "batch_size": 3, "times": uniform_grid(4), **options}
    return generate_pairs(
        teacher or GaussianTeacher(FlowPath(), 0.5, "flow"),
        encode,
        null,
        prompts,
        folder,
        num_pairs,
        shape=SHAPE,
        model="analytic",
        progress=False,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_are_the_teachers_trajectories(tmp_path):
    teacher = GaussianTeacher(FlowPath(), 0.5, "flow")
    dataset = make(tmp_path, guidance=3.0, seed=7)
    assert len(dataset) == 10
    for i in range(10):
        item = dataset[i]
        noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(7 + i))
        assert item["prompt"] == PROMPTS[i % 4]
        assert torch.equal(item["noise"], noise)
        x0 = ode_solve(
            teacher, noise[None], encode([item["prompt"]]), null(1), 3.0, uniform_grid(4)
        )
        torch.testing.assert_close(item["x0"], x0[0])


@pytest.mark.full
def test_long_solutions_reach_the_exact_guided_coupling(tmp_path):
    """Guided Gaussian N(g mu, std^2): the ODE from pure noise z ends at g mu + std z."""
    dataset = make(tmp_path, 4, guidance=2.0, times=uniform_grid(400))
    for item in (dataset[i] for i in range(4)):
        expected = 2.0 * len(item["prompt"]) + 0.5 * item["noise"]
        torch.testing.assert_close(item["x0"], expected, rtol=0, atol=5e-3)


def test_manifest_says_what_made_the_set(tmp_path):
    make(tmp_path, guidance=3.0, seed=7)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    settings = manifest["settings"]
    assert manifest["num_pairs"] == 10
    assert settings["solver"] == "ddim"
    assert settings["times"] == [1.0, 0.75, 0.5, 0.25]
    assert (settings["guidance"], settings["seed"], settings["shape"]) == (3.0, 7, [1, 2, 2])
    assert settings["model"] == "analytic"
    assert "scaled latents" in settings["space"]


@pytest.mark.parametrize("killed_in_shard", [0, 1, 2])
def test_resumed_set_equals_an_uninterrupted_one_bit_for_bit(tmp_path, killed_in_shard):
    make(tmp_path / "whole")

    class Dies(Counting):
        def raw(self, *args: Any) -> Any:
            if self.calls == 8 * killed_in_shard + 3:  # a shard of 4 is 2 batches of 4 steps
                raise KeyboardInterrupt
            return super().raw(*args)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "part", teacher=Dies(FlowPath(), 0.5, "flow"))
    assert len(list((tmp_path / "part").glob("shard-*.safetensors"))) == killed_in_shard
    make(tmp_path / "part")
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_finished_shards_are_not_solved_again(tmp_path):
    make(tmp_path)
    teacher = Counting(FlowPath(), 0.5, "flow")
    make(tmp_path, teacher=teacher)
    assert teacher.calls == 0
    (tmp_path / shard_name(1)).unlink()
    make(tmp_path, teacher=teacher)
    assert teacher.calls == 8  # 2 batches of 4 steps


def test_interrupted_write_leaves_no_shard(tmp_path, monkeypatch):
    def half(path: Path) -> None:
        if path.name.startswith(".shard-"):  # as it is called until it is whole
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stepdistill.storage.files.flush", half)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert not list(tmp_path.glob("shard-*.safetensors"))
    make(tmp_path)
    assert not list(tmp_path.glob("*-tmp"))


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_damaged_shard_is_detected_and_redone(tmp_path, damage):
    make(tmp_path)
    before = contents(tmp_path)
    path = tmp_path / shard_name(1)
    data = path.read_bytes()
    path.write_bytes({"truncate": data[:-5], "empty": b"", "garbage": b"x" * len(data)}[damage])
    with pytest.raises(ValueError, match=r"shard-00001.*truncated.*makes this shard anew"):
        PairDataset(tmp_path)
    make(tmp_path)
    assert contents(tmp_path) == before


def test_set_grows_but_does_not_shrink(tmp_path):
    make(tmp_path / "grown", 6)
    make(tmp_path / "grown", 10)
    make(tmp_path / "whole", 10)
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="num_pairs >= 10 on disk, got 6"):
        make(tmp_path / "grown", 6)


def test_ranks_share_the_shards(tmp_path):
    make(tmp_path / "one")
    assert make(tmp_path / "two", rank=1, world_size=2) is None
    assert not (tmp_path / "two" / shard_name(0)).exists()
    with pytest.raises(ValueError, match=r"expected 3 shards .* got 2 missing"):
        PairDataset(tmp_path / "two")
    assert len(make(tmp_path / "two", rank=0, world_size=2)) == 10
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bfloat16_x0(tmp_path):
    exact, half = make(tmp_path / "a"), make(tmp_path / "b", x0_dtype="bfloat16")
    for i in range(10):
        assert half[i]["x0"].dtype == torch.float32
        assert torch.equal(half[i]["x0"], exact[i]["x0"].bfloat16().float())
        assert torch.equal(half[i]["noise"], exact[i]["noise"])


def test_labels_and_workers(tmp_path):
    def by_label(labels: Sequence[int]) -> Cond:
        return Cond({"mean": torch.tensor(labels).float().view(-1, 1, 1, 1).expand(-1, *SHAPE)})

    teacher = GaussianTeacher(VPPath.from_betas(torch.linspace(1e-4, 0.02, 1000)), 0.1)
    dataset = generate_pairs(
        teacher, by_label, null, [3, 5], tmp_path, 4, shape=SHAPE, model="m", progress=False
    )
    dataset[0]  # opens a file, which must not stop pickling
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy[i]["prompt"] for i in range(4)] == [3, 5, 3, 5]
    assert copy[-1]["prompt"] == 5
    with pytest.raises(IndexError):
        copy[4]


def test_noise_depends_on_the_pair_alone():
    together = pair_noise(3, range(5), SHAPE)
    assert torch.equal(together[2:], pair_noise(3, range(2, 5), SHAPE))
    assert torch.equal(together[1:], pair_noise(4, range(4), SHAPE))
    assert not torch.equal(together[0], together[1])


# -------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"guidance": 5.0}, "guidance 1.0, now 5.0"),
        ({"batch_size": 4}, "batch_size 3, now 4"),
        ({"times": uniform_grid(2)}, "times"),
        ({"prompts": ["other"]}, "prompts_hash"),
        ({"x0_dtype": "bfloat16"}, "x0_dtype"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, named):
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=named):
        make(tmp_path, **change)
    assert contents(tmp_path) == before


def test_shard_of_another_set_is_refused_and_kept(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", seed=1)
    foreign = (tmp_path / "b" / shard_name(1)).read_bytes()
    (tmp_path / "a" / shard_name(1)).write_bytes(foreign)
    with pytest.raises(ValueError, match="Two sets were mixed"):
        PairDataset(tmp_path / "a")
    with pytest.raises(ValueError, match="Two sets were mixed"):
        make(tmp_path / "a")
    assert (tmp_path / "a" / shard_name(1)).read_bytes() == foreign


def test_shard_of_another_place_is_refused(tmp_path):
    make(tmp_path)
    (tmp_path / shard_name(1)).write_bytes((tmp_path / shard_name(0)).read_bytes())
    with pytest.raises(ValueError, match=r"expected pairs 4\.\.7"):
        PairDataset(tmp_path)


def test_missing_or_broken_manifest(tmp_path):
    with pytest.raises(ValueError, match="stepdistill pairs"):
        PairDataset(tmp_path)
    make(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    misspelt, newer = text.replace('"seed"', '"sede"'), text.replace(": 1\n", ": 2\n")
    assert newer != text
    for broken in (text[:-40], "[]", misspelt, newer):
        (tmp_path / MANIFEST).write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json: expected"):
            PairDataset(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"holds shards but no manifest"):
        make(tmp_path)


def test_non_finite_x0_names_the_pair(tmp_path):
    class Overflows(GaussianTeacher):
        def posterior_mean(self, x_t: Any, t: Any, cond: Cond) -> Any:
            out = super().posterior_mean(x_t, t, cond)
            return torch.where(cond["mean"] == 6.0, out / 0, out)  # pairs 3 and 7: "четыре"

    with pytest.raises(ValueError, match=r"pair 3 \('четыре'\)"):
        make(tmp_path, teacher=Overflows(FlowPath(), 0.5))
    assert not list(tmp_path.glob("shard-*"))


def test_bad_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one prompt"):
        make(tmp_path, prompts=[])
    with pytest.raises(ValueError, match="num_pairs >= 1"):
        make(tmp_path, 0)
    with pytest.raises(ValueError, match="batch_size and shard_size >= 1"):
        make(tmp_path, batch_size=0)
    writer = PairWriter(tmp_path, make(tmp_path / "x").settings, 10)
    with pytest.raises(ValueError, match="expected 4 pairs"):
        writer.write(0, torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE), ["a"] * 3)


def flip(path: Path, inside: bytes) -> None:
    """Flip the last bit of the first byte of `inside` in a file."""
    data = bytearray(path.read_bytes())
    data[bytes(data).index(inside)] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_refused_and_made_anew(tmp_path):
    dataset = make(tmp_path)
    before = contents(tmp_path)
    flip(tmp_path / shard_name(1), dataset[5]["x0"].numpy().tobytes())
    dataset = PairDataset(tmp_path)
    dataset[4]
    with pytest.raises(ValueError, match=r"shard-00001.*expected row 1 .*makes this shard anew"):
        dataset[5]
    make(tmp_path)
    assert contents(tmp_path) == before


def test_a_set_of_an_earlier_version_is_read_and_grows(tmp_path):
    whole = make(tmp_path / "whole")
    earlier = make(tmp_path / "earlier", 8)
    for shard in range(2):
        path = tmp_path / "earlier" / shard_name(shard)
        opened = Shard(path)
        told = {"pairs": json.dumps(opened.facts)}
        save_file({name: opened.column(name) for name in ("noise", "x0")}, path, told)
    teacher = Counting(FlowPath(), 0.5, "flow")
    earlier = make(tmp_path / "earlier", teacher=teacher)
    assert teacher.calls == 4  # the third shard alone
    for i in range(10):
        assert torch.equal(earlier[i]["x0"], whole[i]["x0"])
        assert earlier[i]["prompt"] == whole[i]["prompt"]
