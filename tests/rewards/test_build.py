"""Which scorers a run gets: built-in or the user's own, and what is refused before weights load."""

from __future__ import annotations

import pytest
import torch
from support.runs import build_trainer, teacher_dir
from torch import Tensor, nn

from stepdistill import TrainConfig
from stepdistill.core.method import ScorerSpec
from stepdistill.methods.dmd2 import DMD2
from stepdistill.rewards import build_scorers
from stepdistill.trainers import DistributionMatchingTrainer, trainer_of_run

SPECS = {"lpips": ScorerSpec("lpips", {"weights": "nowhere.safetensors"})}


class Own(nn.Module):
    """A user's judge with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, by: Tensor) -> Tensor:
        return self.gain * (images - by).abs().mean(dim=(1, 2, 3))


def test_the_user_s_object_wins_and_is_frozen() -> None:
    own = Own()
    built = build_scorers(SPECS, {"lpips": own})
    assert built == {"lpips": own}
    assert not own.gain.requires_grad


def test_a_plain_function_is_enough() -> None:
    def judge(images: Tensor, by: Tensor) -> Tensor:
        return (images - by).square().mean(dim=(1, 2, 3))

    assert build_scorers(SPECS, {"lpips": judge})["lpips"] is judge


@pytest.mark.parametrize(
    ("specs", "given", "error", "told"),
    [
        ({"a": ScorerSpec("lpip")}, {}, ValueError, r"got 'lpip'. Nearest: \['lpips'"),
        ({"a": ScorerSpec("lpips", {"net": "vgg"})}, {}, ValueError, "scorer lpips: net: Extra"),
        (SPECS, {}, ValueError, "weights to be a file"),
        (SPECS, {"clip": Own()}, ValueError, r"names the method asks for \(\['lpips'\]\)"),
        ({}, {"clip": Own()}, ValueError, r"asks for \(none\), got \['clip'\]"),
        (SPECS, {"lpips": 3}, TypeError, r"scorers\['lpips'\]: expected a callable"),
    ],
)
def test_what_cannot_be_had_is_refused(specs, given, error, told) -> None:
    with pytest.raises(error, match=told):
        build_scorers(specs, given)


class TestInATrainer:
    @pytest.fixture(autouse=True)
    def _asks(self, monkeypatch) -> None:
        monkeypatch.setattr(DMD2, "scorers", lambda self: SPECS)

    @pytest.fixture
    def teacher(self, tmp_path_factory):
        return teacher_dir("sd3", tmp_path_factory)

    def test_missing_weights_are_said_before_the_teacher_loads(
        self, teacher, tmp_path, monkeypatch
    ) -> None:
        def refuse(*_args: object, **_kwargs: object) -> None:
            raise AssertionError("a weight was about to be loaded")

        monkeypatch.setattr("stepdistill.training.trainer.load_family", refuse)
        with pytest.raises(ValueError, match="weights to be a file"):
            DistributionMatchingTrainer(teacher, TrainConfig(output_dir=str(tmp_path)), ["a"])

    def test_losses_get_the_object_passed_to_the_facade(self, teacher, tmp_path) -> None:
        own = Own()
        trainer = DistributionMatchingTrainer(
            teacher, TrainConfig(output_dir=str(tmp_path)), ["a"], scorers={"lpips": own}
        )
        assert trainer.bank.scorer("lpips") is own

    @pytest.mark.full
    def test_a_run_exports_without_its_scorers(self, teacher, tmp_path) -> None:
        build_trainer("dmd2", teacher, "lora", tmp_path, scorers={"lpips": Own()}).train()
        folder = trainer_of_run(tmp_path).export(tmp_path / "out")
        assert (folder / "model_index.json").is_file()
