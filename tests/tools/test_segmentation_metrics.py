from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.tools.segmentation_metrics import edit_distance, edit_score, matches, score_segmentation, segments

labellings = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(np.array)


@given(labellings)
def test_segments_are_the_labelling(labels):
    found = segments(labels)
    assert np.array_equal(np.repeat(found.label, found.end - found.start), labels)
    assert np.all(found.label[1:] != found.label[:-1])
    kept = segments(labels, background=(0,))
    assert len(kept) == (found.label != 0).sum()


@settings(max_examples=50, deadline=None)
@given(st.text("ab", max_size=7), st.text("ab", max_size=7))
def test_edit_distance_is_the_fewest_changes(first, second):
    @cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(first, second) == slow(first, second)


@given(st.lists(labellings, min_size=1, max_size=4))
def test_a_perfect_labelling_scores_100(truth):
    score = score_segmentation(truth, truth)
    assert (score.mof, score.edit, score.f1) == (100, 100, (100, 100, 100))


@given(st.lists(st.tuples(labellings, st.integers(0, 999)), min_size=1, max_size=4))
def test_f1_never_rises_with_the_overlap_and_names_do_not_matter(cases):
    truth = [labels for labels, _ in cases]
    found = [np.random.default_rng(seed).integers(0, 4, len(labels)) for labels, seed in cases]
    score = score_segmentation(found, truth, overlaps=(0.1, 0.25, 0.5, 0.75))
    assert list(score.f1) == sorted(score.f1, reverse=True)
    names = np.array(["d", "a", "c", "b"])
    renamed = score_segmentation([names[x] for x in found], [names[x] for x in truth], overlaps=(0.1, 0.25, 0.5, 0.75))
    assert (renamed.mof, renamed.edit, renamed.f1) == (score.mof, score.edit, score.f1)


def test_a_shift_keeps_the_edit_score():
    truth = np.repeat([0, 1, 2, 1], 25)
    moved = np.concatenate([truth[3:], truth[-3:]])
    score = score_segmentation([moved], [truth])
    assert score.edit == 100
    assert score.mof == 91
    assert score.f1 == (100, 100, 100)


def test_one_segment_cut_in_two_lowers_all_but_the_frames():
    truth = np.repeat([0, 1, 0], 50)
    cut = truth.copy()
    cut[75] = 2
    score = score_segmentation([cut], [truth])
    assert score.mof > 99
    assert score.edit == pytest.approx(60)  # 2 of 5 segments too many
    assert score.f1[2] < 80
    gap = truth.copy()
    gap[75] = 0
    with_background = score_segmentation([gap], [truth], background=(0,))
    assert with_background.edit == 50
    assert with_background.counts[0, 0].tolist() == [1, 1, 0]


def test_frames_pool_over_videos_and_edit_scores_do_not():
    long, short = np.zeros(90, int), np.zeros(10, int)
    score = score_segmentation([long, short + 1], [long, short])
    assert score.mof == 90
    assert score.edit == 50
    assert score.f1 == (50, 50, 50)  # one right, one wrong, one missed


def test_order_of_frames_matters_to_all_but_the_frames():
    rng = np.random.default_rng(0)
    truth, found = np.repeat([0, 1, 2], 20), np.repeat([0, 2, 1], 20)
    order = rng.permutation(60)
    straight, mixed = score_segmentation([found], [truth]), score_segmentation([found[order]], [truth[order]])
    assert straight.mof == mixed.mof
    assert straight.edit != mixed.edit


def test_a_segment_does_not_try_its_second_best_match():
    truth = segments(np.array([1, 1, 1, 1, 0, 1, 1]))
    found = segments(np.array([1, 1, 0, 1, 1, 1, 1]))
    # the second found segment of label 1 lies in the first true one, which is taken, and near the other
    assert matches(segments(np.array([1, 1, 2, 1, 0, 0, 0])), truth, 0.1) == (2, 2, 1)
    assert matches(found, truth, 0.1)[0] == 2


def test_nothing_there():
    nothing, something = segments(np.zeros(4), (0,)), segments(np.ones(4), (0,))
    assert edit_score(nothing, nothing) == 100
    assert edit_score(something, nothing) == 0
    assert matches(something, nothing, 0.1) == (0, 1, 0)
    assert matches(nothing, something, 0.1) == (0, 0, 1)
    assert score_segmentation([np.zeros(4)], [np.ones(4)], background=(0,)).f1 == (0, 0, 0)
    with pytest.raises(ValueError, match=r"video 0 has \(3,\) found labels and \(4,\) true ones"):
        score_segmentation([np.zeros(3)], [np.ones(4)])
    with pytest.raises(ValueError, match="0 labellings cannot be scored against 0"):
        score_segmentation([], [])
