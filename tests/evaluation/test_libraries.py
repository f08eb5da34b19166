"""The distances agree with torchmetrics and torch-fidelity on the same features."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stepdistill.evaluation.frechet import frechet_distance, kernel_distance
from stepdistill.evaluation.manifold import manifold_scores


class Given(nn.Module):
    """A feature network for which features are the images."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(120, 6, generator=generator)
    mixed = torch.randn(90, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    return real, 0.5 * mixed + 0.3


def test_frechet_distance_is_torchmetrics(sets) -> None:
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(sets[0].double(), real=True)
    metric.update(sets[1].double(), real=False)
    assert frechet_distance(*sets) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_is_torch_fidelity_s(sets) -> None:
    first, second = (fid_features_to_statistics(one.double()) for one in sets)
    told = fid_statistics_to_metric(first, second, verbose=False)
    (value,) = told.values()
    assert frechet_distance(*sets) == pytest.approx(float(value), rel=1e-6)


def test_kernel_distance_is_torchmetrics_on_the_whole_set(sets) -> None:
    real, generated = sets[0][:90], sets[1]
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=90)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert kernel_distance(real, generated) == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_precision_and_recall_are_torch_fidelity_s(sets) -> None:
    real, generated = sets
    options = {"prc_neighborhood": 3, "prc_batch_size": 50, "verbose": False}
    told = prc_features_to_metric(generated, real, **options)
    own = asdict(manifold_scores(*sets, k=3))
    assert own["precision"] == pytest.approx(told["precision"], abs=1e-6)
    assert own["recall"] == pytest.approx(told["recall"], abs=1e-6)


def test_rows_at_a_time_change_nothing(sets, monkeypatch) -> None:
    whole = kernel_distance(*sets), manifold_scores(*sets, k=3)
    monkeypatch.setattr("stepdistill.evaluation.frechet.ROWS", 7)
    monkeypatch.setattr("stepdistill.evaluation.manifold.ROWS", 7)
    parts = kernel_distance(*sets), manifold_scores(*sets, k=3)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1] == whole[1]
