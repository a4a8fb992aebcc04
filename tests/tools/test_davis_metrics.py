from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from clipmill.tools.davis_metrics import (
    boundary,
    boundary_accuracy,
    frame_measures,
    mean_recall_decay,
    num_objects,
    region_similarity,
    sequence_measures,
    tolerance,
)


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixel by pixel, as it is defined."""
    height, width = mask.shape
    found = np.zeros(mask.shape, bool)
    for y in range(height):
        for x in range(width):
            right = mask[y, x + 1] if x + 1 < width else None
            below = mask[y + 1, x] if y + 1 < height else None
            corner = mask[y + 1, x + 1] if right is not None and below is not None else None
            found[y, x] = any(other is not None and other != mask[y, x] for other in (right, below, corner))
    return found


def slow_accuracy(truth: np.ndarray, found: np.ndarray, radius: int) -> float:
    """Both boundaries dilated by a disc."""
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = dy**2 + dx**2 <= radius**2
    a, b = slow_boundary(truth), slow_boundary(found)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = (b & binary_dilation(a, disc)).sum() / b.sum()
    recall = (a & binary_dilation(b, disc)).sum() / a.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blobs(seed: int, height: int, width: int, share: float) -> np.ndarray:
    """A mask of a few rectangles, some of them touching the border."""
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < 0.01
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(-2, height), rng.integers(-2, width)
        mask[max(y, 0) : y + rng.integers(1, height + 1), max(x, 0) : x + max(int(width * share), 1)] ^= True
    return mask


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.008, 0.05, 1, 2, 5]))
def test_boundaries_match_as_under_dilation(seed: int, height: int, width: int, threshold: float) -> None:
    truth, found = blobs(seed, height, width, 0.4), blobs(seed + 1, height, width, 0.5)
    np.testing.assert_array_equal(boundary(truth), slow_boundary(truth))
    radius = tolerance(truth.shape, threshold)
    assert boundary_accuracy(truth, found, None, threshold) == slow_accuracy(truth, found, radius)


def test_equal_masks_are_perfect_and_order_does_not_matter() -> None:
    for seed in range(20):
        a, b = blobs(seed, 30, 41, 0.3), blobs(seed + 100, 30, 41, 0.3)
        for mask in (a, np.zeros_like(a), np.ones_like(a)):
            assert region_similarity(mask, mask) == boundary_accuracy(mask, mask) == 1
        assert region_similarity(a, b) == region_similarity(b, a)
        assert boundary_accuracy(a, b) == boundary_accuracy(b, a)


def test_moving_both_masks_changes_nothing() -> None:
    a, b = np.zeros((2, 60, 70), bool)
    a[20:31, 22:35], b[23:36, 20:31] = True, True
    for dy, dx in ((5, 0), (-9, 14), (17, -11)):
        moved = np.roll(a, (dy, dx), (0, 1)), np.roll(b, (dy, dx), (0, 1))
        assert region_similarity(*moved) == region_similarity(a, b)
        assert boundary_accuracy(*moved) == boundary_accuracy(a, b)


def test_a_wide_enough_tolerance_forgives_everything() -> None:
    a, b = np.zeros((2, 20, 20), bool)
    a[2:5, 2:5], b[15:18, 14:19] = True, True
    assert boundary_accuracy(a, b) == 0
    assert boundary_accuracy(a, b, threshold=30) == 1


def test_void_is_taken_out_of_both_masks() -> None:
    a, b, void = np.zeros((3, 20, 20), bool)
    a[4:10, 4:10], b[4:10, 4:14], void[:, 10:] = True, True, True
    assert region_similarity(a, b) == 0.6
    assert region_similarity(a, b, void) == boundary_accuracy(a, b, void) == 1


def test_one_frame_is_its_objects_one_by_one() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 30, 40)).repeat(3, 1).repeat(3, 2).astype(np.uint8)
    truth[:9], found[3:12, :6] = 255, 3
    region, edge = frame_measures(truth, found, 4)
    for number in range(1, 5):
        a, b = truth == number, found == number
        assert region[number - 1] == region_similarity(a, b)
        assert edge[number - 1] == boundary_accuracy(a, b)
    assert region[3] == edge[3] == 1  # absent on both sides


# --- sequences ----------------------------------------------------------------------------------------------


def squares(frames: int, count: int = 2) -> np.ndarray:
    maps = np.zeros((frames, 40, 50), np.uint8)
    for t in range(frames):
        for number in range(count):
            maps[t, 4 + 12 * number : 13 + 12 * number, 5 + t : 20 + t] = number + 1
    return maps


def test_first_and_last_frame_are_not_scored() -> None:
    truth = squares(6)
    found = truth.copy()
    found[0], found[-1] = 0, 9
    curves = sequence_measures(truth, found)
    assert curves.region.shape == curves.boundary.shape == (2, 4)
    assert (curves.region == 1).all()
    assert (curves.boundary == 1).all()


def test_an_object_that_is_never_predicted_is_empty() -> None:
    truth = squares(5)
    found = np.where(truth == 2, 0, truth)
    curves = sequence_measures(truth, found)
    assert (curves.region == [[1] * 3, [0] * 3]).all()
    assert (curves.boundary == [[1] * 3, [0] * 3]).all()


def test_an_object_that_appears_later_is_not_scored() -> None:
    truth = squares(5)
    truth[2:, 30:38, 5:20] = 3
    found = np.where(truth == 3, 0, truth)
    assert (sequence_measures(truth, found).region == 1).all()
    assert num_objects(truth[0]) == 2


def test_an_object_that_disappears_should_be_predicted_empty() -> None:
    truth = squares(5)
    truth[2:][truth[2:] == 2] = 0
    assert (sequence_measures(truth, truth).region == 1).all()
    assert sequence_measures(truth, squares(5)).region[1].tolist() == [1, 0, 0]


def test_void_counts_as_background() -> None:
    truth = squares(5)
    truth[:, 30:] = 255
    assert num_objects(truth[0]) == 2
    found = np.where(truth == 255, 1, truth)
    assert (sequence_measures(truth, found).region[0] < 1).all()


def test_more_objects_than_there_are_is_an_error() -> None:
    found = squares(5)
    found[2, 0, 0] = 3
    with pytest.raises(ValueError, match="a prediction has object 3, but the sequence has 2"):
        sequence_measures(squares(5), found)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 600), st.integers(0, 1000))
def test_decay_is_that_of_four_bins(length: int, seed: int) -> None:
    values = np.random.default_rng(seed).random(length)
    mean, recall, decay = mean_recall_decay(values)
    assert mean == pytest.approx(values.sum() / length)
    assert recall == (values > 0.5).sum() / length
    ends = [int(np.rint(x + 1e-10)) - 1 for x in np.linspace(1, length, 5)]
    bins = [values[a : b + 1].mean() for a, b in pairwise(ends)]
    assert decay == pytest.approx(bins[0] - bins[3])


def test_unknown_values_are_left_out_of_the_mean_but_not_recalled() -> None:
    mean, recall, decay = mean_recall_decay(np.array([1, np.nan, 0.5, np.nan, 0.5, np.nan, 0.75, np.nan]))
    assert (mean, recall) == (0.6875, 0.25)
    assert decay == 0  # (1 + 0.5) / 2 - 0.75
    assert all(np.isnan(v) for v in mean_recall_decay(np.full(4, np.nan))[::2])
