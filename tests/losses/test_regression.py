"""Regression distances against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.losses.regression import (
    absolute_error,
    distance,
    per_sample,
    pseudo_huber,
    sample_huber,
    squared_error,
    weighted_mean,
)

PRED = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
ZERO = torch.zeros_like(PRED)


def test_elementwise_values():
    assert squared_error(PRED, ZERO).tolist() == [[1.0, 4.0], [0.25, 9.0]]
    assert absolute_error(PRED, ZERO).tolist() == [[1.0, 2.0], [0.5, 3.0]]
    expected = [[math.sqrt(e * e + 0.25) - 0.5 for e in row] for row in PRED.tolist()]
    torch.testing.assert_close(pseudo_huber(PRED, ZERO, 0.5), torch.tensor(expected))


def test_the_error_is_prediction_minus_target():
    target = torch.tensor([[3.0, -2.5], [0.5, -1.0]])
    assert squared_error(PRED, target).tolist() == [[4.0, 0.25], [0.0, 16.0]]


def test_sample_huber_of_two_samples():
    """d = 4 numbers, h = 0.25 * 4 = 1: |e|^2 = 4 and 36."""
    target = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    pred = target + torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 6.0, 0.0, 0.0]])
    expected = torch.tensor([(math.sqrt(5.0) - 1.0) / 4, (math.sqrt(37.0) - 1.0) / 4])
    torch.testing.assert_close(sample_huber(pred, target, 0.25), expected)
    torch.testing.assert_close(sample_huber(4 * pred, 4 * target, 1.0), 4 * expected)


def test_pseudo_huber_limits():
    small, large, c = torch.tensor([[1e-6]]), torch.tensor([[50.0]]), 1e-2
    torch.testing.assert_close(pseudo_huber(small, small * 0, c), small**2 / (2 * c))
    torch.testing.assert_close(pseudo_huber(large, large * 0, c), large - c, rtol=1e-5, atol=0)


def test_pseudo_huber_gradient_is_bounded_by_one():
    pred = torch.tensor([[-3.0, 0.0, 1e-3, 7.0]], requires_grad=True)
    pseudo_huber(pred, torch.zeros(1, 4), 1e-3).sum().backward()
    expected = pred.detach() / (pred.detach() ** 2 + 1e-6).sqrt()
    torch.testing.assert_close(pred.grad, expected)


def test_half_precision_is_computed_in_float32():
    pred = torch.full((2, 3), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    value = distance("l2", pred, torch.zeros_like(pred))
    assert value.dtype == torch.float32
    assert value.unique().tolist() == [90000.0]


def test_reductions():
    assert per_sample(squared_error(PRED, ZERO)).tolist() == [2.5, 4.625]
    assert weighted_mean(squared_error(PRED, ZERO)).item() == squared_error(PRED, ZERO).mean()
    weight = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert weighted_mean(squared_error(PRED, ZERO), weight).item() == 2.5


def test_broadcasting_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        squared_error(torch.zeros(4, 1), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"weight of shape \(B,\)"):
        weighted_mean(PRED, torch.ones(2, 1))
    with pytest.raises(ValueError, match="'l2', 'l1' or 'huber'"):
        distance("mse", PRED, ZERO)  # type: ignore[arg-type]
