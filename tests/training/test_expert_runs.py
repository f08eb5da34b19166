"""Runs on two experts (Wan 2.2 A14B): one a run or both, resumed exactly, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.times import uniform_grid
from stepdistill.families.registry import teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.pairs.files import PairSettings

SHAPE = (4, 2, 4, 8)
GRID = {"num_steps": 4, "shift": 5.0, "critic_steps": 1}


class States(TinyData):
    """Items of a low-noise expert's run."""

    def __init__(self) -> None:
        super().__init__(SHAPE, "prompt", ("start",))


def times_told(trainer) -> set[float]:
    """The model times that the networks are told in a training."""
    times: set[float] = set()

    def hear(_net, _args, kwargs) -> None:
        times.update(kwargs["timestep"].tolist())

    hook = trainer.family.net.register_forward_pre_hook(hear, with_kwargs=True)
    trainer.train()
    hook.remove()
    return times


@pytest.mark.full
@pytest.mark.parametrize("method", ["tdm", "dmd2", "sid"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_is_told_its_own_times(expert, method, tmp_path, tmp_path_factory) -> None:
    source = ModelSource(str(teacher_dir("wan_experts", tmp_path_factory)), expert=expert)
    data = States() if expert == "low" else None
    options = {"method_options": GRID, "dataset": data, "max_train_steps": 3}
    trainer = build_trainer(method, source, "lora", tmp_path / "run", **options)
    assert trainer.method.sampler().grid == uniform_grid(4, 5.0)
    times = times_told(trainer)
    low, high = (875.0, 1000.0) if expert == "high" else (0.0, 875.0)
    assert all(low <= t <= high for t in times), times
    assert len(times) > 3


def test_a_low_student_begins_at_the_states(tmp_path, tmp_path_factory) -> None:
    source = ModelSource(str(teacher_dir("wan_experts", tmp_path_factory)), expert="low")
    options = {"method_options": GRID, "dataset": States(), "max_train_steps": 1}
    trainer = build_trainer("dmd2", source, "lora", tmp_path / "run", **options)
    first, seen = trainer.method.sampler().times[0], []

    def see(role, pred) -> None:
        if role == "student" and float(pred.t[0]) == first:
            seen.append(pred.x_t.clone())

    batch = trainer.batches({"index": [0, 1], "prompt": ["a", "b"], "start": torch.ones(2, *SHAPE)})
    with torch.no_grad(), trainer.bank.watched(see):
        for step in range(4):
            trainer.method.sample(trainer.bank, batch, Ctx(step=step, phase="student"))
    assert len(seen) >= 4
    assert all(torch.equal(x, torch.ones(2, *SHAPE)) for x in seen)


@pytest.mark.full
@pytest.mark.parametrize("expert", ["high", "low", "both"])
def test_resume_is_exact(expert, tmp_path, tmp_path_factory) -> None:
    source = ModelSource(str(teacher_dir("wan_experts", tmp_path_factory)), expert=expert)
    options = {"method_options": GRID, "checkpointing_steps": 1}
    options["dataset"] = States() if expert == "low" else None
    whole = build_trainer("tdm", source, "lora", tmp_path / "run", **options)
    whole.train()
    again = build_trainer(
        *("tdm", source, "lora", tmp_path / "run"),
        **options,
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"),
    )
    again.train()
    for role in whole.bank.roles:
        members = (trainer.bank.members(role) for trainer in (whole, again))
        assert len({json.dumps(fingerprint(m)) for m in members}) == 1
    other = ModelSource(source.model, expert="low" if expert == "high" else "high")
    data = States() if other.expert == "low" else None
    with pytest.raises(ValueError, match=f"expert '{expert}' .saved. against '{other.expert}'"):
        build_trainer(
            *("tdm", other, "lora", tmp_path / "run"),
            **{**options, "dataset": data},
            resume_from_checkpoint="latest",
        )


REFUSED = {
    "no such pair": ("wan", "high", "tdm", {}, "expert: expected both for a model of one denoiser"),
    "another kind": ("sd_v", "low", "tdm", {}, "expert: expected both for a model of one denoiser"),
    "method": ("wan_experts", "high", "lcm", {}, "expert: expected both, or a method that keeps"),
    "no step": ("wan_experts", "low", "dmd2", {"num_steps": 1}, "expert: expected a step of the"),
    "warm start": (
        *("wan_experts", "high", "dmd2"),
        {"warm_start": {"updates": 5}, "num_steps": 4},
        "warm_start: expected none of one expert",
    ),
    "heads on both": (
        *("wan_experts", "both", "dmd2", {"gan": {"weight_g": 1e-2}}),
        "dmd2: expected nothing that names blocks of .* two denoisers .*, got a discriminator",
    ),
    "heads alone": ("wan_experts", "both", "ladd", {}, "ladd: .* two denoisers .*discriminator"),
    "left out blocks": (
        *("wan_experts", "both", "dmd2", {"skip_layers": ("block.1",), "guidance": 2.0}),
        "dmd2: .* two denoisers .*, got skip_layers",
    ),
    "no states": (
        "wan_experts",
        "low",
        "tdm",
        GRID,
        r"expected batch fields \['cond', 'start'\], .* --data.pairs_dir",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("no_loading")
def test_refused_before_loading(case, tmp_path, tmp_path_factory) -> None:
    family, expert, method, options, message = REFUSED[case]
    source = ModelSource(str(teacher_dir(family, tmp_path_factory)), expert=expert)
    data = States() if case == "no step" else None
    data = TinyData(SHAPE, "prompt", ("x0",)) if case.startswith("heads") else data
    with pytest.raises(ValueError, match=message):
        build_trainer(
            *(method, source, "lora", tmp_path / "run"), method_options=options, dataset=data
        )


@pytest.mark.usefixtures("no_loading")
def test_a_student_of_another_size_is_of_one_expert(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_experts", tmp_path_factory)
    tuning = Tuning(student="full", student_config={"num_layers": 1})
    with pytest.raises(ValueError, match=r"tuning.student_config: .*one denoiser, got 2 that"):
        build_trainer("tdm", teacher, "full", tmp_path / "run", tuning=tuning)


@pytest.mark.usefixtures("no_loading")
def test_states_of_another_time_are_refused(tmp_path, tmp_path_factory) -> None:
    source = ModelSource(str(teacher_dir("wan_experts", tmp_path_factory)), expert="low")
    data = States()
    data.settings = PairSettings(
        *("m", "", (1.0,), 1.0, 0, SHAPE, "", 1, 1), until=uniform_grid(4, 5.0)[2]
    )
    other = {**GRID, "shift": 9.0}
    with pytest.raises(ValueError, match=r"data.pairs_dir: .*first time, got states at 0\.833333"):
        build_trainer(
            *("tdm", source, "lora", tmp_path / "run"), method_options=other, dataset=data
        )


@pytest.mark.usefixtures("no_loading")
def test_a_folder_with_one_expert_missing(tmp_path, tmp_path_factory) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    whole = teacher_dir("wan_experts", tmp_path_factory)
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**index, "transformer_2": [None, None]}))
    with pytest.raises(ValueError, match=r"boundary_ratio 0\.875 without transformer_2"):
        teacher_facts(folder)
    assert teacher_facts(ModelSource(str(folder), expert="high")).setting.owned == (0.875, 1.0)
    with pytest.raises(ValueError, match="expected a class for transformer_2"):
        teacher_facts(ModelSource(str(folder), expert="low"))
    file.write_text(json.dumps({**index, "boundary_ratio": None}))
    with pytest.raises(ValueError, match="boundary_ratio None beside transformer_2"):
        teacher_facts(ModelSource(str(folder)))


@pytest.mark.full
def test_a_student_of_two_experts_starts_at_another_pair(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_experts", tmp_path_factory)
    one = teacher_dir("wan", tmp_path_factory)
    with pytest.raises(
        ValueError, match=r"of as many denoisers as the teacher's, 2, got .* with 1"
    ):
        build_trainer("tdm", teacher, "lora", tmp_path / "a", init_student_from=str(one))
    for layout in ("lora", "full"):
        trainer = build_trainer(
            *("tdm", teacher, layout, tmp_path / layout), init_student_from=str(teacher)
        )
        nets = (trainer.family.net, trainer.bank.base_of("student"))
        plain = [
            {
                k.replace(".base_layer", ""): v
                for k, v in net.state_dict().items()
                if "lora" not in k
            }
            for net in nets
        ]
        assert nets[0] is not nets[1]
        assert fingerprint(plain[0]) == fingerprint(plain[1])


def test_the_command_line_knows_it() -> None:
    run = RunConfig(pretrained_model_name_or_path="m", method="tdm", expert="low")
    assert run.source.expert == "low"
    assert isinstance(run.train_config(), TrainConfig)
