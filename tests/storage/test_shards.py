"""Folders that several processes write together: whole or absent, read on any number of them."""

from __future__ import annotations

import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from support.faults import killed_at
from support.processes import forked
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stepdistill.loading.stored_tensors import StoredTensors
from stepdistill.roles.role_weights import copy_into, full_tensor, to_cpu
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.storage.folders import fault_of, write_folder
from stepdistill.storage.shards import write_shards

# Rows that 2 and 3 processes share unevenly; 2 rows leave the third of three with none.
SIZES = ((7, 5), (2, 7), (3, 2))


def state_of(world: int) -> dict[str, dict[str, Tensor]]:
    """Weights and AdamW's state after an update, cut among `world` processes if more than one.

    The numbers are known ones, as those of real updates round differently by world.
    """
    net = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in SIZES))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for param in net.parameters():  # a forked process can't start autograd's threads
        param.grad = torch.zeros_like(param)
    optimizer.step()
    moments = {
        f"{name}/{key}": value
        for name, param in net.named_parameters()
        for key, value in optimizer.state[param].items()
    }
    state = {"weights": dict(net.state_dict()), "moments": moments}
    generator = torch.Generator().manual_seed(0)
    for tensors in state.values():
        for value in tensors.values():
            known = torch.randn(value.shape, generator=generator)
            if isinstance(value, DTensor):
                known = distribute_tensor(known, value.device_mesh, value.placements)
            value.detach().copy_(known)
    return state


def save(folder: Path, world: int) -> None:
    write_shards(folder, state_of(world), {"state": {"step": world}})


def saved(tmp_path: Path, world: int) -> Path:
    folder = tmp_path / f"checkpoint-{world}"
    statuses = forked(world, lambda _: save(folder, world), tmp_path / f"of{world}")
    assert statuses == [0] * world, (tmp_path / f"of{world}" / "0.txt").read_text()
    assert fault_of(folder) is None
    return folder


def check_equal(folder: Path, world: int) -> None:
    """What this process reads of the folder into cleared tensors is what was saved."""
    for name, live in state_of(world).items():
        expected = to_cpu(live)
        with torch.no_grad():
            for value in live.values():
                value.zero_()
        StoredTensors(folder / name).read_into(live)
        for key, value in live.items():
            assert torch.equal(full_tensor(value.detach()), expected[key]), f"{name}/{key}"


@pytest.mark.full
@pytest.mark.parametrize(("written", "read"), [(2, 1), (2, 3), (3, 2)])
def test_weights_and_moments_of_any_number_go_to_any(written, read, tmp_path) -> None:
    folder = saved(tmp_path, written)
    assert len(list((folder / "weights").iterdir())) == written
    assert StoredTensors(folder / "weights").facts["0.weight"] == ((7, 5), torch.float32)
    if read == 1:
        check_equal(folder, 1)
        return
    statuses = forked(read, lambda _: check_equal(folder, read), tmp_path / "read")
    assert statuses == [0] * read, (tmp_path / "read" / "0.txt").read_text()


def test_a_whole_file_goes_into_shards(tmp_path) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, {k: to_cpu(v) for k, v in state_of(1).items()}, {})
    statuses = forked(2, lambda _: check_equal(folder, 2), tmp_path / "read")
    assert statuses == [0, 0], (tmp_path / "read" / "0.txt").read_text()


# ------------------------------------------------------------------------- damage
@pytest.fixture(scope="module")
def good_of_two(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("good"), 2)


@pytest.fixture
def of_two(good_of_two, tmp_path) -> Path:
    return Path(shutil.copytree(good_of_two, tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("damage", ["flip", "missing", "foreign", "pickled"])
def test_damage_is_found(of_two, damage) -> None:
    shard = of_two / "moments" / "shard-00002-model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        shard.write_bytes(data)
        told = f"moments/{shard.name} has another sha256 than the manifest"
    elif damage == "missing":
        shard.unlink()
        told = f"moments/{shard.name} is missing"
    elif damage == "foreign":
        (shard.parent / "shard-00003.safetensors").write_bytes(data)
        told = "moments/shard-00003.safetensors is not in its manifest"
    else:
        (shard.parent / ".metadata.pkl").write_bytes(b"")
        told = ".metadata.pkl is pickled, which is not read"
    assert fault_of(of_two) == told


@pytest.mark.parametrize(
    ("gone", "told"),
    [(1, "got 3 of the 7 numbers of 0.bias"), (2, r"0.bias of \(7,\) .*, got \(4,\)")],
)
def test_a_part_that_no_shard_holds_is_no_zero(of_two, gone, told) -> None:
    """Whatever the manifest says: 4 of 7 rows are with the first process, 3 with the second."""
    shards = sorted((of_two / "weights").iterdir())
    shards[gone - 1].unlink()
    with pytest.raises(ValueError, match=told):
        copy_into(state_of(1)["weights"], StoredTensors(of_two / "weights"), "role 'student'")


# ------------------------------------------------------------------------- faults
def _rewritten(folder: Path, victim: int, count: int, rank: int) -> None:
    state = state_of(2)
    if rank == victim:
        killed_at(count)
    write_shards(folder / "checkpoint-2", state, {"state": {"step": 2}})


def _killed(tmp_path: Path, victim: int, count: int) -> list[int]:
    """Statuses of a save in which the victim is killed; asserts that nothing is lost by it."""
    good, newer = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    if not good.exists():
        write_folder(good, {}, {"state": {"step": 1}})
    out, before = tmp_path / f"try{count}", newest_valid(tmp_path)[0]
    statuses = forked(2, partial(_rewritten, tmp_path, victim, count), out)
    assert fault_of(good) is None
    found, _ = newest_valid(tmp_path)
    if statuses != [0, 0]:
        assert statuses[victim] == -signal.SIGKILL
        assert found in (before, newer)
    if found == good:
        assert statuses[1 - victim] == 1
        told = (out / f"{1 - victim}.txt").read_text()
        assert "checkpoint-2: expected to write it" in told
    return statuses


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_process_in_a_save_leaves_the_last_good_one(victim, tmp_path) -> None:
    """The folder is begun, and neither of both has written its weights."""
    assert _killed(tmp_path, victim, 4 - victim)[victim] == -signal.SIGKILL
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-1"


@pytest.mark.full
@pytest.mark.sampled_in_full("1")
@pytest.mark.parametrize("victim", [0, 1])
def test_no_operation_of_one_process_can_be_killed_to_lose_one(victim, tmp_path) -> None:
    tries = 1
    while _killed(tmp_path, victim, tries) != [0, 0]:
        tries += 1
    assert tries > 5
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert not list(tmp_path.glob("*-tmp"))


def _on_a_full_disk(folder: Path, rank: int) -> None:
    state = state_of(2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    write_shards(folder / "checkpoint-2", state, {})


@pytest.mark.full
def test_a_full_disk_of_one_is_told_by_all(tmp_path) -> None:
    good = tmp_path / "checkpoint-1"
    write_folder(good, {}, {"state": {"step": 1}})
    out = tmp_path / "out"
    assert forked(2, partial(_on_a_full_disk, tmp_path), out) == [1, 1]
    told = (out / "0.txt").read_text().splitlines()[-1]  # what the other one says has no room
    assert "checkpoint-2: expected to write it, got process 1: [Errno 27] File too large" in told
    assert newest_valid(tmp_path) == (good, [])
    assert not list(tmp_path.glob("*-tmp"))
