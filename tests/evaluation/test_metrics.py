"""Diversity: of which prompts, and of how many images."""

import pytest
import torch

from stepdistill.evaluation.metrics import DIVERSITY_IMAGES, diversity


def test_a_repeated_line_among_single_images_is_no_diversity() -> None:
    """Nine lines, one of them twice in the file: a single pair would stand for all."""
    assert diversity(torch.randn(9, 3), [*"abcdefgh", "a"]) is None


def test_a_label_that_was_drawn_once_hides_no_others() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 1], [9, 9]])
    assert diversity(features, [0, 0, 1, 1, 2]) == pytest.approx(2.5)


def test_of_an_unconditional_model_the_first_images_count() -> None:
    first = torch.randn(DIVERSITY_IMAGES, 3, generator=torch.Generator().manual_seed(0))
    rest = torch.full((1000, 3), 1e6)
    found = diversity(torch.cat([first, rest]), [None] * (1000 + DIVERSITY_IMAGES))
    assert found == pytest.approx(float(torch.pdist(first.double()).mean()), rel=1e-12)
