"""disback's runs: what a node is, resume inside both stages, dmd2 without nodes, stock export."""

from __future__ import annotations

import json

import pytest
import torch
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir

from stepdistill import DistributionMatchingTrainer, TrainConfig, TrajectorySegmentedTrainer, Tuning
from stepdistill.families.registry import load_family, teacher_facts

# Two updates record a node and the fake's start; then the target is the node, then the teacher.
NODES = {"nodes": 2, "record_updates": 2, "backtrack_updates": 1}


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


def make(method, teacher, folder, layout="lora", steps=4, args=None, **options):
    told = teacher_facts(teacher).conditioning
    return DistributionMatchingTrainer(
        str(teacher),
        TrainConfig(
            output_dir=str(folder), tuning=Tuning(student=layout, fake=layout, rank=2),
            learning_rate=1e-3, train_batch_size=2, max_train_steps=steps,
            disable_progress_bar=True, **(args or {}),
        ),
        TinyData(load_family(teacher).sample_shape(), told, ()),
        method=method,
        method_config={"critic_steps": 1, **options},
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_a_node_is_the_fake_as_it_was_and_stays_so(layout, teacher, tmp_path) -> None:
    """Of four steps: node 1 after the first, the fake goes on; the student waits for two."""
    trainer = make("disback", teacher, tmp_path / "run", layout, **NODES)
    bank, seen = trainer.bank, []
    for step in range(1, 5):
        trainer.train(until=step)
        seen.append({role: fingerprint(bank.members(role)) for role in bank.roles})
    assert seen[0]["node_1"] == seen[0]["fake"] != seen[1]["fake"]
    assert all(one["node_1"] == seen[0]["node_1"] for one in seen)
    assert seen[1]["student"] == seen[0]["student"] != seen[2]["student"]
    x_t, t = torch.randn(2, *trainer.family.sample_shape()), torch.tensor([0.9, 0.3]).double()
    cond = trainer.family.encode(["a", "b"])
    reported = []
    with torch.no_grad(), bank.watched(lambda role, pred: reported.append(role)):
        node = bank["node_1"](x_t, t, cond).raw
        instead = bank.carrying("teacher", "node_1", 1.0)
        assert torch.equal(instead["teacher"](x_t, t, cond).raw, node)
        assert not torch.equal(bank["teacher"](x_t, t, cond).raw, node)
    assert reported == ["node_1", "teacher", "teacher"]


@pytest.mark.full
def test_it_resumes_inside_either_stage_and_between(teacher, tmp_path) -> None:
    folder = tmp_path / "run"
    trainer = make("disback", teacher, folder, args={"checkpointing_steps": 1}, **NODES)
    trainer.train()
    for step in (1, 2, 3):
        args = {"resume_from_checkpoint": str(folder / f"checkpoint-{step}")}
        resumed = make("disback", teacher, folder, args=args, **NODES)
        resumed.train()
        for role in trainer.bank.roles:
            first, second = (fingerprint(one.bank.members(role)) for one in (trainer, resumed))
            assert first == second, (step, role)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_without_nodes_every_weight_is_dmd2_s(layout, teacher, tmp_path) -> None:
    weights = []
    for method, options in (("disback", {"nodes": 0}), ("dmd2", {})):
        trainer = make(method, teacher, tmp_path / method, layout, 2, num_steps=2, **options)
        trainer.train()
        weights.append({r: fingerprint(trainer.bank.members(r)) for r in ("student", "fake")})
    assert weights[0] == weights[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "layout", "scheduler"),
    [("sd_v", "lora", "LCMScheduler"), ("sd3", "full", "FlowMatchLCMScheduler")],
)
def test_a_student_exports_to_stock_schedulers(
    family, layout, scheduler, tmp_path, tmp_path_factory
) -> None:
    """`export` loads the folder in Diffusers and compares its image with the sampler's."""
    trainer = build_trainer(
        "disback", teacher_dir(family, tmp_path_factory), layout, tmp_path / "run"
    )
    trainer.train()
    folder = trainer.export(tmp_path / "out")
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == scheduler
    parts = {part.name for part in folder.iterdir() if part.is_dir()}
    assert not {part for part in parts if "node" in part}


@pytest.mark.usefixtures("no_loading")
class TestBeforeLoading:
    def test_a_run_that_ends_before_the_teacher(self, teacher, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"max_train_steps above 300 .*, got 300\. Train long"):
            DistributionMatchingTrainer(
                str(teacher), TrainConfig(output_dir=str(tmp_path / "o"), max_train_steps=300),
                ["a"], method="disback",
            )  # fmt: skip

    def test_stages_beyond_the_run(self, teacher, tmp_path) -> None:
        """Of any method: here tscd's, which was told at its first update."""
        data = TinyData((4, 4, 4), "prompt", ("x0",))
        options = {"segments": (2, 1), "stage_starts": (30,)}
        with pytest.raises(ValueError, match="below max_train_steps 30"):
            TrajectorySegmentedTrainer(
                str(teacher), TrainConfig(output_dir=str(tmp_path / "o"), max_train_steps=30),
                data, method="tscd", method_config=options,
            )  # fmt: skip
