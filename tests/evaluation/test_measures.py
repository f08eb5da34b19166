"""Diversity, drift, times and scores on values known beforehand."""

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.evaluation.metrics import (
    Number,
    System,
    diversity,
    drift,
    numbers_of,
    seconds_per_image,
    set_distances,
)
from stepdistill.reporting.values import Measured
from stepdistill.rewards.preference import linear_head


def test_diversity_is_the_mean_of_prompts_mean_distances() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 1], [9, 9]])
    assert diversity(features, ["a", "a", "b", "b", "c"]) == pytest.approx(2.5)


def test_one_image_a_prompt_has_no_diversity() -> None:
    assert diversity(torch.zeros(2, 3), ["a", "b"]) is None


def test_drift_is_relative_and_absent_for_grey() -> None:
    assert drift(0.3, 0.2) == pytest.approx(0.5)
    assert drift(0.0, 0.0) is None


def test_time_is_the_median_without_warm_ups() -> None:
    assert seconds_per_image([(2, -10.0), (2, 1.0), (1, 0.7), (2, 1.2)]) == pytest.approx(0.6)
    assert seconds_per_image([(2, -10.0)]) == 5


def test_distances_of_a_set_to_itself() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    found = set_distances(x, x.clone(), k=3)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_a_value_that_a_seed_lacks_is_left_out() -> None:
    made = numbers_of([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}], network="n")
    assert made == [Number("a", Measured(2.0, pytest.approx(2**0.5)), "n")]


def test_a_number_is_found_by_network_and_reference() -> None:
    numbers = [
        Number("frechet", Measured(1, 0), "x", "real"),
        Number("frechet", Measured(2, 0), "x", "teacher"),
    ]
    system = System("a", "student", 1, numbers, 5)
    assert system.get("frechet", "x", "teacher") == Measured(2, 0)
    assert system.get("kid") is None


def test_linear_layers_fold_into_one_head(tmp_path) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))
    state = {f"layers.{k}": v.detach() for k, v in layers.state_dict().items()}
    weight, bias = linear_head(state, "file")
    x = torch.randn(3, 5)
    torch.testing.assert_close(x @ weight + bias, layers(x)[:, 0].detach())


def test_a_head_that_is_none_is_refused(tmp_path) -> None:
    save_file({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layers that end in one number"):
        linear_head({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, "file")
