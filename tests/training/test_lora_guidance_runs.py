"""Guidance distillation and halving on real networks: start, memory of rounds, resume, exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir
from torch import nn

from stepdistill import TrainConfig, Tuning
from stepdistill.core.context import Ctx
from stepdistill.export.load import load_pipeline
from stepdistill.export.pipeline import RECORD
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.roles.rolebank import BASE
from stepdistill.trainers import LoRADistillationTrainer

G = 4.0
ROUNDS = {"guidance": G, "num_steps": (4,), "stage_starts": (2,)}


def trainer_of(family, tmp_path_factory, output_dir, options=None, layout="lora", **args):
    teacher = teacher_dir(family, tmp_path_factory)
    config = TrainConfig(
        **{
            "output_dir": str(output_dir),
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "disable_progress_bar": True,
            "tuning": Tuning(student=layout, rank=2),
            **args,
        }
    )
    shape = load_family(teacher).sample_shape()
    data = TinyData(shape, teacher_facts(teacher).conditioning, ("x0",))
    return LoRADistillationTrainer(
        str(teacher), config, data, method_config={"guidance": G, **(options or {})}
    )


def first_batch(trainer):
    return trainer.batches({"index": [0, 1], **_columns(trainer.dataset, 2)})


def _columns(dataset, count):
    items = [dataset[i] for i in range(count)]
    return {
        key: torch.stack([item[key] for item in items])
        if isinstance(items[0][key], torch.Tensor)
        else [item[key] for item in items]
        for key in items[0]
    }


# -------------------------------------------------------------------------------- before training
@pytest.mark.sampled("dit-lora", "sd3-full")
@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd_v", "sd3", "dit"])
def test_first_loss_is_the_guidance_left_out(family, layout, tmp_path, tmp_path_factory) -> None:
    """The student starts as the conditional teacher: (g - 1)^2 |out_c - out_u|^2."""
    trainer = trainer_of(family, tmp_path_factory, tmp_path / "run", layout=layout)
    nets, batch = trainer.bank, first_batch(trainer)
    asked = {}

    class Spy:
        def __getitem__(self, role):
            def call(x_t, t, *rest, **more):
                asked[role] = (x_t, t)
                return nets[role](x_t, t, *rest, **more)

            return call

    loss = trainer.method.loss(Spy(), batch, Ctx(seed=5, max_steps=2)).total
    x_t, t = asked["student"]
    with torch.no_grad():
        student = nets["student"](x_t, t, batch.cond).raw
        cond, null = (nets["teacher"](x_t, t, c).raw for c in (batch.cond, batch.null))
    assert torch.equal(student, cond), "an untrained adapter answers as the teacher, bit for bit"
    expected = (G - 1) ** 2 * (cond - null).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.full
def test_an_untrained_embedding_tells_nothing(tmp_path, tmp_path_factory) -> None:
    options = {"embed_guidance": True, "guidance_range": (2.0, 14.0)}
    trainer = trainer_of("sd", tmp_path_factory, tmp_path / "run", options, "full")
    batch = first_batch(trainer)
    x, t = torch.randn(2, *batch.shape), torch.tensor([0.9, 0.2], dtype=torch.float64)
    teacher = trainer.bank["teacher"](x, t, batch.cond).raw
    for w in (1.0, 13.0):
        told = trainer.bank["student"](x, t, batch.cond, w=torch.full((2,), w)).raw
        assert torch.equal(told, teacher)


def test_an_embedding_needs_weights_of_its_own(tmp_path, tmp_path_factory) -> None:
    options = {"embed_guidance": True, "guidance_range": (2.0, 14.0)}
    with pytest.raises(ValueError, match="expected full of a student with extra inputs"):
        trainer_of("sd", tmp_path_factory, tmp_path / "run", options, "lora")


@pytest.mark.full
def test_trainable_parameters_are_r_times_in_plus_out(tmp_path, tmp_path_factory) -> None:
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    tuning = Tuning(student="lora", rank=3, target_modules=targets)
    trainer = trainer_of("sd", tmp_path_factory, tmp_path / "run", tuning=tuning)
    plain = load_family(teacher_dir("sd", tmp_path_factory)).net
    expected = sum(
        3 * (module.in_features + module.out_features)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(targets)
    )
    found = sum(p.numel() for p in trainer.bank.parameters() if p.requires_grad)
    assert found == expected > 0


# -------------------------------------------------------------------------------- while training
@pytest.mark.full
def test_disabling_the_adapter_restores_the_teacher(tmp_path, tmp_path_factory) -> None:
    trainer = trainer_of("sd_v", tmp_path_factory, tmp_path / "run")
    batch = first_batch(trainer)
    x, t = torch.randn(2, *batch.shape), torch.tensor([0.9, 0.2], dtype=torch.float64)
    before = trainer.bank["teacher"](x, t, batch.cond, batch.null, G).raw
    trainer.train()
    assert not torch.equal(trainer.bank["student"](x, t, batch.cond).raw, before)
    assert torch.equal(trainer.bank["teacher"](x, t, batch.cond, batch.null, G).raw, before)
    fresh = load_family(teacher_dir("sd_v", tmp_path_factory)).net.state_dict()
    base = {
        name.replace(".base_layer.", "."): value
        for name, value in trainer.bank.nets[BASE].state_dict().items()
        if ".lora_" not in name
    }
    assert fingerprint(base) == fingerprint(fresh)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_resume_inside_a_round_and_across_the_switch_is_exact(
    layout, tmp_path, tmp_path_factory
) -> None:
    args = {"max_train_steps": 4, "checkpointing_steps": 1, "layout": layout}
    first = trainer_of("sd3", tmp_path_factory, tmp_path / "run", ROUNDS, **args)
    first.train()
    for checkpoint in (1, 2, 3):
        where = str(tmp_path / "run" / f"checkpoint-{checkpoint}")
        again = trainer_of(
            "sd3", tmp_path_factory, tmp_path / "run", ROUNDS, resume_from_checkpoint=where, **args
        )
        again.train()
        for role in ("student", "target"):
            one, two = first.bank.members(role), again.bank.members(role)
            assert fingerprint(one) == fingerprint(two), (role, checkpoint)


@pytest.mark.full
def test_a_round_s_teacher_is_the_student_that_finished_the_one_before(
    tmp_path, tmp_path_factory
) -> None:
    args = {"max_train_steps": 4, "checkpointing_steps": 1}
    trainer = trainer_of("sd3", tmp_path_factory, tmp_path / "run", ROUNDS, **args)
    trainer.train()
    target, student = (fingerprint(trainer.bank.members(r)) for r in ("target", "student"))
    assert target != student
    state = trainer.optimizer.state
    assert {int(state[p]["step"]) for p in trainer.bank.members("student").values()} == {2}
    trainer.restore(tmp_path / "run" / "checkpoint-2")
    assert fingerprint(trainer.bank.members("student")) == target


@pytest.mark.full
def test_the_learning_rate_falls_in_each_round(tmp_path, tmp_path_factory) -> None:
    options = {**ROUNDS, "anneal": True, "stage_rates": (1.0, 0.5)}
    trainer = trainer_of(
        "sd_v", tmp_path_factory, tmp_path / "run", options, max_train_steps=4, logging_steps=1
    )
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [v for line in lines for k, v in line.items() if k.startswith("lr")]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


# ----------------------------------------------------------------------------------- the result
def pushed(trainer):
    """The student moved off its start, so that no part of it is idle."""
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    return trainer


@pytest.mark.sampled("dit-lora")
@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3", "dit"])
def test_export_keeps_the_teacher_s_scheduler(family, layout, tmp_path, tmp_path_factory) -> None:
    """Written, loaded back and compared: the stock loop makes the unmerged student's image."""
    options = {"teacher_steps": 6}
    trainer = pushed(trainer_of(family, tmp_path_factory, tmp_path / "run", options, layout))
    out = trainer.export(tmp_path / "out")
    record = json.loads((out / RECORD).read_text())
    assert (record["num_inference_steps"], record["guided"], record["times"]) == (6, False, None)
    config = "scheduler/scheduler_config.json"
    saved = [Path(folder) / config for folder in (out, teacher_dir(family, tmp_path_factory))]
    mine, theirs = (json.loads(path.read_text()) for path in saved)
    assert mine == theirs


def calls_of(pipe, **options) -> int:
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _m, inputs: rows.append(len(inputs[0])))
    pipe.set_progress_bar_config(disable=True)
    pipe("a", output_type="pt", **options)
    hook.remove()
    return sum(rows)


@pytest.mark.full
def test_a_call_with_a_prompt_alone_makes_half_the_teacher_s_network_calls(
    tmp_path, tmp_path_factory
) -> None:
    options = {"teacher_steps": 6}
    trainer = pushed(trainer_of("sd_v", tmp_path_factory, tmp_path / "run", options))
    ours = load_pipeline(trainer.export(tmp_path / "out"))
    teacher = load_family(teacher_dir("sd_v", tmp_path_factory)).pipeline
    assert calls_of(ours) == 6, "neither steps nor guidance had to be said"
    assert calls_of(teacher, num_inference_steps=6) == 12


@pytest.mark.full
@pytest.mark.parametrize(("family", "scheduler"), [("sd_v", "DDIM"), ("sd3", "FlowMatchEuler")])
def test_export_after_halving_visits_the_last_grid(
    family, scheduler, tmp_path, tmp_path_factory
) -> None:
    trainer = pushed(trainer_of(family, tmp_path_factory, tmp_path / "run", {"num_steps": (8, 4)}))
    out = trainer.export(tmp_path / "out")
    record = json.loads((out / RECORD).read_text())
    assert record["num_inference_steps"] == 4
    assert record["times"] == record["trained_times"]
    assert record["call"] == {}
    saved = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"].startswith(scheduler)
    if scheduler == "DDIM":
        assert record["visited_model_times"] == [999, 749, 499, 249]
        assert saved["timestep_spacing"] == "trailing"


@pytest.mark.full
def test_adapter_file_keeps_the_scheduler_and_says_no_guidance(tmp_path, tmp_path_factory) -> None:
    trainer = pushed(trainer_of("sd", tmp_path_factory, tmp_path / "run"))
    out = trainer.export(tmp_path / "lora", format="lora")
    record = json.loads((out / RECORD).read_text())
    assert record["guidance_scale"] == 1.0
    assert "guidance_scale=1" in (out / "README.md").read_text()


@pytest.mark.full
def test_guidance_is_not_counted_twice(tmp_path, tmp_path_factory) -> None:
    trainer = pushed(trainer_of("sd_v", tmp_path_factory, tmp_path / "run", {"teacher_steps": 4}))
    out = trainer.export(tmp_path / "out")
    args = TrainConfig(output_dir=str(tmp_path / "two"), disable_progress_bar=True)
    with pytest.raises(ValueError, match="it would count twice"):
        LoRADistillationTrainer(str(out), args, ["a"], method_config={"guidance": 7.5})
    halving = {"guidance": 1.0, "guidance_stage": False, "num_steps": (4,), "states": "trajectory"}
    LoRADistillationTrainer(str(out), args, ["a"], method_config=halving)


@pytest.mark.full
def test_a_smaller_student_learns_the_teacher_s_scores_and_dmd2_goes_on_from_it(
    tmp_path, tmp_path_factory
) -> None:
    """Without guidance, which a student of the teacher's weights has nothing to learn by."""
    plain = {"guidance": 1.0}
    with pytest.raises(ValueError, match="the teacher is its own student"):
        trainer_of("sd_v", tmp_path_factory, tmp_path / "own", plain, layout="full")
    smaller = Tuning(student="full", student_config={"block_out_channels": [8, 8]})
    first = trainer_of("sd_v", tmp_path_factory, tmp_path / "first", plain, tuning=smaller)
    losses = [v for name, v in first.train().items() if name.startswith("loss/")]
    assert min(losses) > 1e-3  # from random weights
    second = build_trainer(
        *("dmd2", teacher_dir("sd_v", tmp_path_factory), "full", tmp_path / "second"),
        init_student_from=str(tmp_path / "first"),
        tuning=smaller,
    )
    begins, ended = (t.bank.role_state("student") for t in (second, first))
    assert begins.keys() == ended.keys()
    assert all(torch.equal(begins[name], ended[name]) for name in begins)
    second.train()
    stock = DiffusionPipeline.from_pretrained(second.export(tmp_path / "out"))
    assert stock.unet.config.block_out_channels == [8, 8]
