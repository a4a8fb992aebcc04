"""One-pass evaluation: analytic scores, invariances, and frames with invalid boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clipmill.tools import ope

FLOATS = st.floats(-200, 200, width=32)
SIDES = st.floats(1, 100, width=32)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(1, 12))
    corner, side = arrays(float, (count, 2), elements=FLOATS), arrays(float, (count, 2), elements=SIDES)
    truth, found = (np.concatenate([draw(corner), draw(side)], 1) for _ in range(2))
    return truth, found


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, float)


@pytest.mark.parametrize("toolkit", ope.TOOLKITS)
def test_a_perfect_tracker(toolkit: ope.Toolkit) -> None:
    truth = boxes((10, 10, 30, 40), (12.5, 11, 30.25, 41), (14, 9, 31, 40))
    found = ope.score(truth, truth, toolkit)
    np.testing.assert_array_equal(found.success, [1.0] * 20 + [0.0])  # nothing exceeds 1
    assert found.auc == pytest.approx(20 / 21, abs=1e-12)
    np.testing.assert_array_equal(found.precision, 1.0)
    np.testing.assert_array_equal(found.norm_precision, 1.0)


@pytest.mark.parametrize("toolkit", ope.TOOLKITS)
def test_analytic_scores(toolkit: ope.Toolkit) -> None:
    """A box of 40 x 40 that is d pixels to the right has overlap (40 - d) / (40 + d)."""
    shifts = np.arange(40.0)
    truth = np.tile([50.0, 60.0, 40.0, 40.0], (40, 1))
    found = truth + shifts[:, None] * [1, 0, 0, 0]
    frames = ope.frames(truth, found, toolkit)
    np.testing.assert_allclose(frames.overlap, (40 - shifts) / (40 + shifts), atol=1e-12)
    np.testing.assert_allclose(frames.error_px, shifts, atol=1e-12)
    np.testing.assert_allclose(frames.norm_error, shifts / 40, atol=1e-12)
    curves = ope.curves(frames, toolkit)
    expected = [((40 - shifts) / (40 + shifts) > threshold / 20).mean() for threshold in range(21)]
    np.testing.assert_allclose(curves.success[[1, 7, 13, 19]], np.array(expected)[[1, 7, 13, 19]], atol=1e-12)
    assert curves.precision_20px == 21 / 40
    assert curves.norm_precision_20 == 9 / 40
    assert curves.success_rate == 14 / 40  # (40 - d) / (40 + d) > 1/2 for d = 0 ... 13


@settings(deadline=None, max_examples=50)
@given(pairs(), st.sampled_from(ope.TOOLKITS), st.floats(1, 60, width=16), st.sampled_from([0.5, 2.0, 4.0]))
def test_invariances(pair: tuple[np.ndarray, np.ndarray], toolkit: ope.Toolkit, by: float, scale: float) -> None:
    truth, found = pair
    curves = ope.score(truth, found, toolkit)
    assert (np.diff(curves.success) <= 0).all()
    assert (np.diff(curves.precision) >= 0).all()
    assert (np.diff(curves.norm_precision) >= 0).all()
    np.testing.assert_allclose(ope.overlap(truth, found), ope.overlap(found, truth), atol=1e-12)
    moved = by * np.array([1, 1, 0, 0])
    np.testing.assert_allclose(ope.overlap(truth + moved, found + moved), ope.overlap(truth, found), atol=1e-9)
    np.testing.assert_allclose(ope.overlap(truth * scale, found * scale), ope.overlap(truth, found), atol=1e-9)
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(len(truth) - 1)]).astype(int)
    np.testing.assert_allclose(ope.score(truth[order], found[order], toolkit).success, curves.success)


def test_every_sequence_counts_the_same() -> None:
    good = ope.score(boxes(*[(10, 10, 20, 20)] * 9), boxes(*[(10, 10, 20, 20)] * 9))
    bad = ope.score(boxes((10, 10, 20, 20), (10, 10, 20, 20)), boxes((10, 10, 20, 20), (200, 200, 20, 20)))
    mean = ope.mean([good, bad])
    assert mean.precision_20px == pytest.approx(0.75)
    assert ope.mean([good, bad, good, bad]).auc == pytest.approx(mean.auc)


# --- invalid boxes ------------------------------------------------------------------------------------------

BOX = (10.0, 10.0, 20.0, 20.0)
FAR = (500.0, 500.0, 20.0, 20.0)


def test_invalid_truth() -> None:
    """The frames that a toolkit marks fail every overlap and pass every distance."""
    truth = boxes(BOX, (10, 10, 0, 20), (-30, 10, 20, 20), (np.nan,) * 4)
    found = boxes(BOX, FAR, FAR, FAR)
    rates = {toolkit: ope.score(truth, found, toolkit) for toolkit in ope.TOOLKITS}
    assert {name: one.success[0] for name, one in rates.items()} == dict.fromkeys(ope.TOOLKITS, 0.25)
    assert rates["otb"].precision_20px == 1.0
    # pysot: the centre of the flat box is positive, that of the one outside is not, nor is NaN
    assert rates["pysot"].precision_20px == 0.75
    assert rates["got10k"].precision_20px == 0.25


def test_the_first_box_is_the_truth_but_for_pysot() -> None:
    truth, found = boxes(BOX, BOX), boxes(FAR, BOX)
    assert {name: ope.score(truth, found, name).precision_20px for name in ope.TOOLKITS} == {
        "otb": 1.0,
        "pysot": 0.5,
        "got10k": 1.0,
    }


@pytest.mark.parametrize("lost", [(np.nan,) * 4, (10, 10, 0, 20), (10, 10, 20, -1)])
def test_a_lost_target(lost: tuple[float, ...]) -> None:
    """The OTB toolkit carries the last box on, also over several frames; the others count a failure."""
    truth, found = boxes(*[BOX] * 4), boxes(BOX, BOX, lost, lost)
    assert ope.score(truth, found, "otb").success_rate == 1.0
    assert ope.score(truth, found, "pysot").success_rate == 0.5
    assert ope.score(truth, found, "got10k").success_rate == 0.5
    np.testing.assert_array_equal(found[2], lost)  # what was given is left alone


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (0, 4)])
def test_boxes_that_do_not_fit(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must both be"):
        ope.score(np.ones((2, 4)) if shape[0] else np.ones(shape), np.ones(shape))
