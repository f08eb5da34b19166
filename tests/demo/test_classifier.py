"""The feature network recognises held-out digits and its features see blur and missing modes."""

import pytest
import torch

from stepdistill.demo.classifier import FEATURE_WIDTH, DigitClassifier, train_classifier
from stepdistill.demo.data import Digits, load_digit_splits, stratified_subset
from stepdistill.demo.metrics import Judge
from stepdistill.evaluation.samples import Samples


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digit_splits()


@pytest.fixture(scope="module")
def classifier(digits: Digits) -> DigitClassifier:
    return train_classifier(digits.train)


@pytest.fixture(scope="module")
def judge(digits: Digits, classifier: DigitClassifier) -> Judge:
    return Judge(digits, classifier)


@pytest.mark.full
def test_held_out_accuracy(digits: Digits, classifier: DigitClassifier) -> None:
    assert classifier.accuracy(digits.heldout.images, digits.heldout.labels) > 0.96


@pytest.mark.full
def test_logits_are_the_head_of_the_features(digits: Digits, classifier: DigitClassifier) -> None:
    images = digits.heldout.images[:4]
    features = classifier.features(images)
    assert features.shape == (4, FEATURE_WIDTH)
    assert torch.equal(classifier(images), classifier.head(features))


def test_training_leaves_global_randomness_alone(digits: Digits) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_classifier(digits.train, epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_floor_is_low_and_diverse(judge: Judge) -> None:
    floor = judge.floor()
    assert floor.frechet.mean < 2
    assert floor.recall.mean > 0.88
    assert floor.frechet.std > 0


def test_class_means_are_recognised_but_score_badly(digits: Digits, judge: Judge) -> None:
    """The blur that fools accuracy: distance far over the floor, recall zero."""
    train, labels = digits.train, digits.heldout.labels
    means = torch.stack([train.images[train.labels == k].mean(0) for k in range(10)])[labels]
    row = judge.score("mean", "student", 1, [Samples(means, 1.0, 1.0)])
    assert row.accuracy.mean > 0.95
    assert row.frechet.mean > 10 * judge.floor().frechet.mean
    assert row.recall.mean == 0


def test_missing_a_class_lowers_recall(digits: Digits, judge: Judge) -> None:
    labels = digits.heldout.labels
    images = stratified_subset(digits.train, labels, seed=0)
    whole = judge.score("whole", "student", 1, [Samples(_in_order(images, labels), 1.0, 1.0)])
    ones = digits.train.images[digits.train.labels == 1]
    part = _in_order(images, labels)
    part[labels == 8] = ones[: int((labels == 8).sum())]
    missing = judge.score("missing", "student", 1, [Samples(part, 1.0, 1.0)])
    assert missing.recall.mean < whole.recall.mean - 0.04
    assert missing.frechet.mean > 2 * whole.frechet.mean


def test_row_carries_cost_and_previews(digits: Digits, judge: Judge) -> None:
    images = digits.heldout.images
    row = judge.score("same", "teacher", 4, [Samples(images, 5.39, 4.0)] * 2)
    assert row.frechet.mean == pytest.approx(0, abs=1e-6)
    assert row.recall.mean == 1
    assert row.seconds_per_image == pytest.approx(0.01)
    assert row.network_calls == 4
    assert row.previews.shape == (20, 1, 8, 8)


def test_wrong_number_of_images_is_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="few: expected images of shape"):
        judge.score("few", "student", 1, [Samples(torch.zeros(3, 1, 8, 8), 1.0, 1.0)])


def _in_order(split, labels: torch.Tensor) -> torch.Tensor:
    """The split's images arranged so that their classes are `labels`."""
    images = torch.empty(len(labels), 1, 8, 8)
    for label in labels.unique():
        images[labels == label] = split.images[split.labels == label]
    return images
