from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sk_confusion
from sklearn.metrics import recall_score, top_k_accuracy_score

from clipmill.tools import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def brute_force(query: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    similarity = metrics.unit_rows(query) @ metrics.unit_rows(gallery).T
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def test_accuracy_agrees_with_scikit_learn(rng: np.random.Generator) -> None:
    scores, labels = rng.normal(size=(80, 9)), rng.integers(0, 9, 80)
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(9))
        assert metrics.topk_accuracy(scores, labels, k) == pytest.approx(expected)
    predictions = metrics.top_classes(scores, 1)[:, 0]
    np.testing.assert_array_equal(metrics.confusion_matrix(predictions, labels, 9), sk_confusion(labels, predictions))
    recall = recall_score(labels, predictions, labels=range(9), average="macro", zero_division=0)
    assert metrics.mean_class_accuracy(predictions, labels) == pytest.approx(recall)


def test_equal_scores_favour_the_larger_class() -> None:
    scores = np.array([[0.3, 0.3, 0.1, 0.3]])
    assert metrics.top_classes(scores, 4).tolist() == [[3, 1, 0, 2]]
    assert metrics.topk_accuracy(scores, np.array([0]), 2) == 0.0
    assert metrics.topk_accuracy(scores, np.array([1]), 2) == 1.0


def test_more_places_than_classes_is_always_right() -> None:
    assert metrics.topk_accuracy(np.eye(3), np.array([2, 0, 1]), 5) == 1.0


def test_accuracy_does_not_see_order_or_a_constant(rng: np.random.Generator) -> None:
    logits, labels = rng.normal(size=(50, 4, 7)), rng.integers(0, 7, 50)
    order, constant = rng.permutation(50), rng.normal(size=(50, 1, 1))
    for how in ("prob", "score"):
        average = metrics.average_views(logits, how)
        for k in (1, 5):
            accuracy = metrics.topk_accuracy(average, labels, k)
            assert 0 < accuracy < 1
            assert metrics.topk_accuracy(average[order], labels[order], k) == accuracy
            assert metrics.topk_accuracy(metrics.average_views(logits + constant, how), labels, k) == accuracy


def test_probabilities_and_scores_rank_alike_with_one_view(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(30, 1, 6))
    ranks = [metrics.top_classes(metrics.average_views(logits, how), 6) for how in ("prob", "score")]
    np.testing.assert_array_equal(*ranks)
    many = 4 * rng.normal(size=(200, 5, 6))
    ranks = [metrics.top_classes(metrics.average_views(many, how), 1) for how in ("prob", "score")]
    assert (ranks[0] != ranks[1]).any()


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    predictions, labels = np.array([0, 1, 3]), np.array([0, 1, 1])
    assert metrics.mean_class_accuracy(predictions, labels) == pytest.approx((1 + 0.5 + 0) / 3)


def test_nearest_keeps_the_gallery_order_of_ties(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = rng.choice([-1.0, 1.0], (40, 4))  # norm 2: every similarity is exact, most occur several times
    gallery[[5, 6]] = 0.0
    query = rng.choice([-1.0, 1.0], (20, 4))
    for pairs in (1, 130, 1 << 20):
        monkeypatch.setattr(metrics, "_PAIRS_PER_BLOCK", pairs)
        for k in (1, 4, 39, 40):
            numbers, similarity = metrics.nearest(query, gallery, k)
            np.testing.assert_array_equal(numbers, brute_force(query, gallery, k))
            assert (np.diff(similarity, axis=1) <= 0).all()
    assert len(np.unique(similarity[0])) < 6
    assert metrics.nearest(query, gallery, 99)[0].shape == (20, 40)


def test_hit_rates_grow_to_the_share_of_known_classes(rng: np.random.Generator) -> None:
    gallery, query = rng.normal(size=(30, 5)), rng.normal(size=(60, 5))
    labels, wanted = rng.integers(0, 6, 30), rng.integers(0, 9, 60)
    numbers, _ = metrics.retrieve(query, gallery, 30)
    rates = metrics.hit_rates(labels[numbers], wanted, range(1, 31))
    assert rates == sorted(rates)
    assert rates[-1] == np.isin(wanted, labels).mean() < 1


def test_a_gallery_finds_itself(rng: np.random.Generator) -> None:
    gallery, labels = rng.normal(size=(25, 8)), np.arange(25)
    numbers, _ = metrics.retrieve(gallery, gallery, 3)
    assert metrics.hit_rates(labels[numbers], labels, [1]) == [1.0]


def test_cosine_ignores_lengths_and_centring_ignores_shifts(rng: np.random.Generator) -> None:
    gallery, query = rng.normal(size=(30, 5)), rng.normal(size=(12, 5))
    plain = metrics.retrieve(query, gallery, 30)[0]
    scaled = metrics.retrieve(query * rng.uniform(0.1, 9, (12, 1)), gallery * rng.uniform(0.1, 9, (30, 1)), 30)[0]
    np.testing.assert_array_equal(plain, scaled)
    centred = metrics.retrieve(query, gallery, 30, centre=True)[0]
    shift = rng.normal(size=5)
    np.testing.assert_array_equal(centred, metrics.retrieve(query + shift, gallery, 30, centre=True)[0])
    np.testing.assert_array_equal(centred, metrics.retrieve(query, gallery + shift, 30, centre=True)[0])
    assert (metrics.retrieve(query, gallery + shift, 30)[0] != plain).any()
    assert (centred != plain).any()
