"""k-means against its definition and faiss, empty clusters, balanced epochs, whitening, mutual information."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from clipmill.models import clustering


def blobs(count=300, dim=6, centres=5, seed=0):
    rng = np.random.default_rng(seed)
    middles = rng.normal(0, 4, (centres, dim))
    return middles[np.arange(count) % centres] + rng.normal(0, 0.7, (count, dim))


def test_labels_are_the_nearest_centroids_and_the_objective_falls():
    x = blobs()
    found = clustering.kmeans(x, 7, iterations=15, seed=1)
    distances = np.square(x[:, None] - found.centroids).sum(2)
    assert np.array_equal(found.labels, distances.argmin(1))
    assert found.inertia == pytest.approx(distances.min(1).sum())
    assert (np.diff(found.objective) <= 1e-9).all()
    assert found.inertia <= found.objective[-1] + 1e-9
    for number in range(7):
        assert (found.labels == number).any()


def test_the_seed_decides():
    x = blobs()
    one, same, other = (clustering.kmeans(x, 9, seed=seed).labels for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_faiss_and_lloyd_agree(monkeypatch):
    pytest.importorskip("faiss")
    x = blobs(2000, 16, 12, seed=5)
    mine = clustering.kmeans(x, 12, seed=2)
    monkeypatch.setattr(clustering, "SMALL", 0)
    theirs = clustering.kmeans(x, 12, seed=2)
    assert np.array_equal(mine.labels, theirs.labels)
    np.testing.assert_allclose(theirs.centroids, mine.centroids, rtol=0, atol=1e-4)
    done = len(theirs.objective)  # faiss stops when nothing moves any more
    np.testing.assert_allclose(theirs.objective, mine.objective[:done], rtol=1e-4)


def test_without_faiss_large_problems_are_solved_too(monkeypatch):
    monkeypatch.setattr(clustering, "SMALL", 0)
    monkeypatch.setattr(clustering, "_faiss", lambda: None)
    x = blobs(100)
    assert len(np.unique(clustering.kmeans(x, 5, seed=0).labels)) > 1


def test_an_empty_cluster_is_refilled_from_a_large_one():
    centroids = np.array([[1.0, 2.0], [5.0, 5.0], [9.0, 9.0]])
    sizes = np.array([10, 0, 1])
    clustering.split_empty(centroids, sizes, np.random.default_rng(0))
    assert sizes.tolist() == [5, 5, 1]  # a cluster of one never gives
    e = clustering.EPS
    np.testing.assert_allclose(centroids[1], [1 + e, 2 * (1 - e)])
    np.testing.assert_allclose(centroids[0], [1 - e, 2 * (1 + e)])


def test_clusters_without_points_are_filled_while_iterating():
    x = np.concatenate([np.zeros((50, 3)), np.full((50, 3), 8.0)]) + np.random.default_rng(0).normal(0, 0.1, (100, 3))
    start = np.concatenate([x[:1], x[50:51], np.full((1, 3), 1e6)])  # nothing is near the third
    found = clustering.lloyd(x, start, 20, np.random.default_rng(0))
    assert np.bincount(found.labels, minlength=3).min() > 0


def test_impossible_numbers_of_clusters_are_refused():
    with pytest.raises(ValueError, match="cannot make 11 clusters of 10 samples"):
        clustering.kmeans(blobs(10), 11)
    with pytest.raises(ValueError, match="pca_dim = 7"):
        clustering.whiten(blobs(100, dim=6), 7)


def test_whitened_features_have_identity_covariance():
    x = blobs(400, 8) @ np.random.default_rng(1).normal(size=(8, 8))
    white = clustering.whiten(x, 5)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(5), atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(clustering.unit(white), axis=1), 1.0)
    flat = clustering.whiten(np.concatenate([x[:, :2], np.zeros((400, 2))], 1), 4)
    assert np.isfinite(flat).all()
    np.testing.assert_allclose(flat[:, 2:], 0.0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=80), st.integers(0, 99))
def test_balanced_epochs_draw_every_cluster_equally(labels, seed):
    labels = np.array(labels)
    size = len(labels)
    names, members = np.unique(labels, return_counts=True)
    drawn = clustering.balanced_epoch(labels, size, np.random.RandomState(seed))
    assert len(drawn) == size
    assert set(labels[drawn]) <= set(names)
    each = size // len(names) + 1
    for name, count in zip(names, members, strict=True):
        rows = drawn[labels[drawn] == name]
        assert len(rows) <= each
        if count > each:
            assert len(set(rows.tolist())) == len(rows)
    dropped = each * len(names) - size  # the tail that was cut off
    counts = np.array([(labels[drawn] == name).sum() for name in names])
    assert (each - counts).sum() == dropped


def test_weights_balance_the_loss():
    labels = np.array([0, 0, 0, 2])
    weights = clustering.balance_weights(labels, 4)
    np.testing.assert_allclose(weights, [4 / (2 * 3), 0, 2, 0])
    assert weights[labels].mean() == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=60))
def test_mutual_information_equals_scikit_learn(pairs):
    a, b = np.array(pairs).T
    assert clustering.nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-9)
