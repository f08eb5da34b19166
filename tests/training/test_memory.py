"""When activations are recomputed, and how the switch for it is spelt."""

from __future__ import annotations

import pytest
from torch import nn

from stepdistill import TrainConfig
from stepdistill.training.configfile import parse_run_config
from stepdistill.training.memory import AUTO_PARAMETERS, checkpoints_activations


def net(count: int) -> nn.Module:
    return nn.Linear(count, 1, bias=False, device="meta")


@pytest.mark.parametrize(("count", "expected"), [(AUTO_PARAMETERS, True), (1000, False)])
def test_auto_recomputes_in_big_denoisers(count: int, expected: bool) -> None:
    assert checkpoints_activations(TrainConfig(), net(count)) is expected


def test_adapters_do_not_make_a_denoiser_big() -> None:
    small = net(1000)
    small.lora_A = nn.ModuleDict({"student": net(AUTO_PARAMETERS)})
    small_in = nn.ModuleDict({"layer": small})
    assert not checkpoints_activations(TrainConfig(), small_in)


def test_a_quantised_base_always_recomputes() -> None:
    args = TrainConfig(tuning={"base_quantization": "int8"})
    assert checkpoints_activations(args, net(1000))


@pytest.mark.parametrize("told", [True, False])
def test_what_is_told_counts(told: bool) -> None:
    args = TrainConfig(gradient_checkpointing=told)
    assert checkpoints_activations(args, net(AUTO_PARAMETERS)) is told
    assert checkpoints_activations(args, net(1000)) is told


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "--seed", "1"], True),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing", "auto"], "auto"),
        (["--no-gradient_checkpointing"], False),
        (["--gradient_checkpointing=true"], True),
    ],
)
def test_the_switch_is_a_flag_or_takes_a_value(flags: list[str], expected: bool | str) -> None:
    run = parse_run_config(["--pretrained_model_name_or_path", "m", "--method", "dmd2", *flags])
    assert run.gradient_checkpointing == expected
