from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.tools.localisation_metrics import THRESHOLDS, Labelled, rescale, score_detection, score_proposals, tiou

seeds = st.integers(0, 10**6)


def some(seed: int, truths: int = 12, found: int = 60) -> tuple[Labelled, Labelled]:
    """Detections that are true segments, moved a little, and others."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 80, truths)
    truth = Labelled(
        video=rng.integers(0, 4, truths),
        label=rng.integers(0, 3, truths),
        segment=np.stack([start, start + rng.uniform(2, 20, truths)], 1),
    )
    near = rng.integers(0, truths, found)
    moved = truth.segment[near] + rng.normal(0, 1.5, (found, 2))
    wrong = rng.random(found) < 0.2
    label = np.where(wrong, rng.integers(0, 3, found), truth.label[near])
    segment = np.sort(moved, 1)
    return Labelled(video=truth.video[near], label=label, segment=segment, score=rng.permutation(found) + 1.0), truth


def slow_ap(found: Labelled, truth: Labelled, label: int, limit: float) -> float:
    """The definition, one detection after the other."""
    assert found.score is not None
    mine = [i for i in np.argsort(-found.score) if found.label[i] == label]
    actual = [j for j in range(len(truth)) if truth.label[j] == label]
    taken: set[int] = set()
    hits = []
    for i in mine:
        overlap = {
            j: tiou(found.segment[[i]], truth.segment[[j]])[0, 0] for j in actual if truth.video[j] == found.video[i]
        }
        hit = next(
            (j for j in sorted(overlap, key=lambda j: -overlap[j]) if overlap[j] >= limit and j not in taken), None
        )
        hits.append(hit is not None)
        taken |= {hit} if hit is not None else set()
    precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
    recall = [sum(hits[: n + 1]) / len(actual) for n in range(len(hits))]
    area, before = 0.0, 0.0
    for n, r in enumerate(recall):
        area += (r - before) * max(precision[n:])
        before = r
    return area


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_average_precision_is_its_definition(seed):
    found, truth = some(seed)
    score = score_detection(found, truth, (0.5, 0.8))
    for row, limit in enumerate((0.5, 0.8)):
        expected = [slow_ap(found, truth, label, limit) for label in score.classes]
        np.testing.assert_allclose(score.ap[row], expected, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_invariants_of_detection(seed):
    found, truth = some(seed)
    score = score_detection(found, truth)
    assert np.all(np.diff(score.by_threshold) <= 1e-12)
    scaled = score_detection(moved(found, 7.0, 0.0), moved(truth, 7.0, 0.0))
    np.testing.assert_allclose(scaled.ap, score.ap)
    shifted = score_detection(moved(found, 1.0, 64.0), moved(truth, 1.0, 64.0))
    np.testing.assert_allclose(shifted.average, score.average, atol=1e-6)
    perfect = score_detection(
        Labelled(video=truth.video, label=truth.label, segment=truth.segment, score=np.ones(12)), truth
    )
    assert perfect.average == 1
    names = np.array(["x", "y", "z"])
    renamed = score_detection(relabelled(found, names), relabelled(truth, names))
    assert renamed.average == score.average


def parts(one: Labelled) -> dict:
    return {"video": one.video, "label": one.label, "segment": one.segment, "score": one.score}


def perfect_of(truth: Labelled) -> Labelled:
    return Labelled(**{**parts(truth), "score": np.ones(len(truth))})


def moved(one: Labelled, scale: float, shift: float) -> Labelled:
    return Labelled(**{**parts(one), "segment": one.segment * scale + shift})


def relabelled(one: Labelled, names: np.ndarray) -> Labelled:
    return Labelled(**{**parts(one), "label": names[one.label]})


def test_a_copy_of_a_match_with_less_score_does_not_help():
    truth = Labelled(video=np.array([0, 0]), label=np.array([0, 0]), segment=np.array([[0.0, 10], [20, 30]]))

    def ap(*rows: tuple[float, float, float]) -> float:
        x = np.array(rows)
        zero = np.zeros(len(x), int)
        return score_detection(Labelled(video=zero, label=zero, segment=x[:, :2], score=x[:, 2]), truth, (0.5,)).average

    assert ap((0, 10, 0.9)) == 0.5
    assert ap((0, 10, 0.9), (0, 10, 0.8)) == 0.5
    assert ap((0, 10, 0.9), (0, 10, 0.8), (20, 30, 0.7)) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert ap((0, 10, 0.9), (20, 30, 0.8)) == 1


def test_the_second_best_segment_may_be_taken():
    truth = Labelled(video=np.array([0, 0]), label=np.array([0, 0]), segment=np.array([[0.0, 10], [1, 11]]))
    zero = np.zeros(2, int)
    both = Labelled(video=zero, label=zero, segment=np.array([[0.0, 10], [0, 10]]), score=np.array([2.0, 1.0]))
    assert score_detection(both, truth, (0.5,)).average == 1


def test_strangers_are_counted_and_left_out():
    truth = Labelled(video=np.array(["a"]), label=np.array(["run"]), segment=np.array([[0.0, 1.0]]))
    found = Labelled(
        video=np.array(["a", "a", "b"]),
        label=np.array(["fly", "run", "run"]),
        segment=np.array([[0.0, 1.0]] * 3),
        score=np.array([3.0, 2.0, 1.0]),
    )
    score = score_detection(found, truth)
    assert score.unknown == 1
    assert score.average == 1
    with pytest.raises(ValueError, match="a score for every detection"):
        score_detection(truth, truth)


def proposal_case(seed: int) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 50, (5, 3))
    truth = {video: np.stack([start[video], start[video] + rng.uniform(1, 20, 3)], 1) for video in range(5)}
    found = {}
    for video in range(4):  # one video has no proposals
        rows = np.sort(rng.uniform(0, 70, (rng.integers(20, 60), 2)), 1)
        found[video] = np.column_stack([rows, rng.permutation(len(rows)) / 100])
    return found, truth


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_invariants_of_average_recall(seed):
    found, truth = proposal_case(seed)
    score = score_proposals(found, truth)
    assert np.all(np.diff(score.average_recall) >= 0)
    assert np.all(np.diff(score.recall, axis=0) <= 0)
    best = {video: tiou(truth[video], rows[:, :2]).max(1) for video, rows in found.items()}
    reached = [np.mean([(value >= limit).sum() for value in best.values()]) * 4 / 15 for limit in THRESHOLDS]
    assert score.at(100) == pytest.approx(np.mean(reached))
    scaled = score_proposals(
        {video: rows * (3, 3, 1) for video, rows in found.items()}, {video: rows * 3 for video, rows in truth.items()}
    )
    np.testing.assert_allclose(scaled.recall, score.recall)


def test_all_truths_among_the_proposals_give_a_final_recall_of_1():
    found, truth = proposal_case(0)
    found = {video: np.column_stack([rows, np.ones(3)]) for video, rows in truth.items()}
    score = score_proposals(found, truth)
    assert score.at(100) == 1
    assert score.auc == pytest.approx(0.5 + 5 / 6 + 97)  # 1/3, 2/3, 1, 1, ... from 1 proposal to 100
    with pytest.raises(ValueError, match="proposals for some of their videos"):
        score_proposals({}, truth)


def test_rescaling_keeps_constants_and_ramps():
    constant = rescale(np.full((37, 2), 3.0))
    assert constant.shape == (100, 2)
    np.testing.assert_allclose(constant, 3.0)
    ramp = rescale(np.arange(50.0)[:, None], 20, 5)
    np.testing.assert_allclose(np.diff(ramp[:, 0]), (49 - 2e-4) / 20)
    assert np.all(rescale(np.arange(50.0)[:, None], 20, 5, "max") > ramp)
    np.testing.assert_array_equal(rescale(np.array([[1.0, 2.0]]), 3), [[1, 2]] * 3)
