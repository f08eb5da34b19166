"""The digits are real, complete, and split without overlap."""

import pytest
import torch

from stepdistill.demo.data import load_digit_splits, prompt_for, stratified_subset


def test_all_1797_images_are_used_once() -> None:
    digits = load_digit_splits()
    both = torch.cat([digits.train.images, digits.heldout.images])
    assert len(both) == 1797
    assert both.shape[1:] == (1, 8, 8)
    assert both.min() == -1
    assert both.max() == 1


def test_every_class_keeps_the_same_share() -> None:
    digits = load_digit_splits(heldout_fraction=0.3)
    train, heldout = (part.labels.bincount() for part in (digits.train, digits.heldout))
    assert torch.allclose(heldout / (train + heldout), torch.full((10,), 0.3), atol=0.005)


def test_split_repeats_and_follows_its_seed() -> None:
    first, again, other = (load_digit_splits(seed=seed).heldout.images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_prompts_follow_labels() -> None:
    digits = load_digit_splits()
    assert prompt_for(7) == "a handwritten seven"
    assert digits.train.prompts[:3] == [prompt_for(int(x)) for x in digits.train.labels[:3]]


def test_subset_has_the_class_counts_asked_for() -> None:
    digits = load_digit_splits()
    subset = stratified_subset(digits.train, digits.heldout.labels, seed=0)
    assert torch.equal(subset.labels.bincount(), digits.heldout.labels.bincount())
    assert len(subset.images.flatten(1).unique(dim=0)) == len(subset)  # no image twice


def test_subset_larger_than_the_split_is_refused() -> None:
    digits = load_digit_splits()
    with pytest.raises(ValueError, match="split: expected at least"):
        stratified_subset(digits.heldout, digits.train.labels, seed=0)


def test_share_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match="heldout_fraction"):
        load_digit_splits(heldout_fraction=1.0)
