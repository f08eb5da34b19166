"""What is played back is what would have run, to the byte and the operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import teacher_dir
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stepdistill.config.run import RunConfig
from stepdistill.planning.fakes import Shapes, fake_mode, fresh
from stepdistill.planning.forecast import _to_fake, _traced
from stepdistill.planning.playback import backward
from stepdistill.planning.replay import Replay
from stepdistill.planning.tracker import CostTracker
from stepdistill.testing.tiny import TINY_FAMILY

CASES = [
    ("dit", "consistency", "lora", True),
    ("sd3", "dmd2", "full", False),
    ("sd_v", "consistency", "lora", True),
    *(
        (family, "dmd2", layout, checkpointing)
        for family in ("sd", "sdxl", "flux", "qwen_image", "wan", "wan_i2v", "z_image", "dit")
        for layout, checkpointing in (("lora", True), ("full", False))
    ),
]


@pytest.mark.full
@pytest.mark.sampled_in_full(
    *("dit-consistency-lora-True", "sd3-dmd2-full-False", "sd_v-consistency-lora-True"),
    *("flux-dmd2-full-False", "qwen_image-dmd2-lora-True", "wan-dmd2-full-False"),
)
@pytest.mark.parametrize(("family", "method", "layout", "checkpointing"), CASES)
def test_a_forecast_is_the_same_when_every_block_is_run(
    family: str, method: str, layout: str, checkpointing: bool, tmp_path_factory: Any
) -> None:
    guided = TINY_FAMILY[family].has_null
    options: dict[str, Any] = {"guidance": 3.0 if guided else 1.0} if method == "dmd2" else {}
    run = RunConfig(
        pretrained_model_name_or_path=str(teacher_dir(family, tmp_path_factory)),
        method=method,
        method_config=options,
        tuning={"student": layout, "fake": layout, "rank": 2},
        train_batch_size=2,
        gradient_checkpointing=checkpointing,
        mixed_precision="bf16" if checkpointing else "no",
        ema_decay=0.9,
    ).model_dump_json()
    assert _traced(run, True) == _traced(run, False)


class Block(nn.Module):
    """Residual and a linear layer; its runs are counted."""

    runs = 0

    def __init__(self, scale: float = 1.0, view: bool = False) -> None:
        super().__init__()
        self.proj, self.scale, self.view = nn.Linear(8, 8), scale, view

    def forward(self, x: Tensor) -> Tensor:
        Block.runs += 1
        return x[:, :4].t() if self.view else x + self.scale * self.proj(x).relu()


def counted(replayed: bool, *options: dict[str, Any], grad: bool = True) -> tuple[list[int], int]:
    """([peak, operations, bytes left], runs of a block) of a chain of such blocks."""
    mode, tracker = fake_mode(), CostTracker(remember=replayed)
    with torch.device("meta"):
        net = nn.Sequential(*(Block(**one) for one in options))
    _to_fake(net, mode)
    if replayed:
        Replay(tracker, mode).wrap(net)
    tracker.watch(net.parameters())
    Block.runs = 0
    with tracker, torch.set_grad_enabled(grad):
        out = net(fresh(mode, (4, 8), torch.float32))
        if grad:
            out.sum().backward()
    return [tracker.peak, tracker.flops, tracker.live], Block.runs


@pytest.mark.parametrize("grad", [True, False])
def test_alike_blocks_run_for_the_first_alone(grad: bool) -> None:
    (as_it_is, runs), (replayed, few) = (counted(r, *[{}] * 20, grad=grad) for r in (False, True))
    assert replayed == as_it_is
    assert runs == 20
    assert few <= (6 if grad else 1)  # with and without a gradient of the input


def test_a_block_of_another_number_is_another() -> None:
    options = [{"scale": float(i)} for i in range(5)]
    (as_it_is, _), (replayed, runs) = (counted(r, *options, grad=False) for r in (False, True))
    assert (replayed, runs) == (as_it_is, 5)


class Pair(nn.Module):
    """Of two streams that meet, with a table for each. No result is kept by its graph,
    whose call would not be played back."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(entries, 8) for _ in range(2))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.proj(x + y + self.tables[0](rows))
        return inner.sin(), self.proj(y * inner).sin() + self.tables[1](rows)


class Chain(nn.Module):
    """Pairs. lost: nothing needs the last one's second stream, and what follows is large. shared:
    the first one's table is used again, and large. padded: its first stream has values."""

    def __init__(self, case: str) -> None:
        super().__init__()
        entries = 5000 if case == "shared" else 10
        self.pairs, self.case = nn.ModuleList(Pair(entries) for _ in range(3)), case

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        first: Any = self.pairs[0]
        x, y = first.proj(x).sin(), first.proj(x)
        if self.case == "padded":
            x = nn.utils.rnn.pad_sequence([*x], batch_first=True)
            assert not isinstance(x, FakeTensor)
        for pair in self.pairs:
            x, y = pair(x, y, rows)
        if self.case == "shared":
            return (x + y) * first.tables[1](rows)
        del y
        return x.repeat(1, 1, 40).sin()


@pytest.mark.parametrize("case", ["lost", "shared", "padded"])
def test_results_let_go_of_and_parameters_shared_and_inputs_with_values(case: str) -> None:
    counts = []
    for replayed in (False, True):
        mode, tracker = fake_mode(), CostTracker(remember=replayed)
        with torch.device("meta"):
            net = Chain(case)
        _to_fake(net, mode)
        if replayed:
            Replay(tracker, mode).wrap(net.pairs)
        tracker.watch(net.parameters())
        with tracker:
            rows = fresh(mode, (4, 16), torch.int64)
            backward(net(fresh(mode, (4, 16, 8), torch.float32), rows).sum())
        counts.append([tracker.peak, tracker.flops, tracker.live])
    assert counts[0] == counts[1]


def test_a_view_of_the_input_is_run_as_it_is() -> None:
    mode = fake_mode()
    x = fresh(mode, (4, 8), torch.float32)
    for replayed in (False, True):
        tracker = CostTracker(remember=replayed)
        tracker.watch([x])
        block = Block(view=True)
        if replayed:
            Replay(tracker, mode).wrap([block])
        with tracker, torch.no_grad():
            outs = [block(x) for _ in range(3)]
        assert all(out.untyped_storage() is x.untyped_storage() for out in outs)


def test_shapes_made_again_share_storages_as_before() -> None:
    mode = fake_mode()
    x, other = fresh(mode, (4, 8), torch.bfloat16), fresh(mode, (3,), torch.float32)
    shapes = Shapes.of([x.t(), x[1:], other])
    assert shapes.nbytes == 4 * 8 * 2 + 3 * 4
    assert Shapes.of(shapes.made(mode)) == shapes
    lying = Shapes.of([x[2:]], given=[x.untyped_storage()])
    (made,) = lying.made(mode, [x.untyped_storage()])
    assert made.untyped_storage() is x.untyped_storage()
    assert lying.nbytes == 0
