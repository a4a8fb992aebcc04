from __future__ import annotations

import numpy as np
import pytest
import torch

from clipmill.tools.pose import THRESHOLDS, errors, heat_map, heat_maps, pck, read_joints


def clip(seed: int = 0, frames: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).uniform(20, 200, (2, 15, frames))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_heat_maps_are_one_at_their_joint_and_zero_far_away(sigma: float) -> None:
    for x, y in ((20.3, 17.8), (25.5, 30.0), (31.9, 12.1)):
        found = heat_map(x, y, sigma, 48, 60)
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert found.max() == 1
        assert max(abs(column - x), abs(row - y)) <= 1
        dy, dx = abs(np.arange(48)[:, None] - y), abs(np.arange(60) - x)
        assert (found[np.maximum(dy, dx) > 3 * sigma + 1] == 0).all()
    assert not heat_map(-90, 5, sigma, 48, 60).any()
    assert not heat_map(5, 200, sigma, 48, 60).any()
    assert heat_map(-0.4, 47.2, sigma, 48, 60).any()


def test_a_small_sigma_rounds_and_a_large_one_truncates() -> None:
    for x, y in ((17.4, 13.6), (17.6, 13.4)):
        for sigma, place in ((0.5, (round(x), round(y))), (4, (int(x), int(y)))):
            row, column = np.unravel_index(heat_map(x, y, sigma, 30, 30).argmax(), (30, 30))
            assert (column, row) == place


def test_background_is_where_no_joint_is() -> None:
    maps = heat_maps(np.array([[3.0, 10], [4, 12]]), 0.5, 16, 16, background=True)
    assert maps.shape == (3, 16, 16)
    np.testing.assert_array_equal(maps[0], (maps[1:].sum(0) == 0))
    assert len(heat_maps(np.zeros((2, 4)), 0.5, 16, 16, background=False)) == 4


def test_a_single_cell_is_read_exactly_and_an_empty_map_is_lost() -> None:
    maps = torch.zeros(3, 9, 13)
    maps[0, 7, 11], maps[2, 0, 0] = 0.2, 1.0
    np.testing.assert_array_equal(read_joints(maps, 3), [[11, -1, 0], [7, -1, 0]])


def test_joints_are_weighted_means() -> None:
    maps = torch.zeros(1, 6, 8)
    maps[0, 2, 1], maps[0, 2, 5], maps[0, 4, 5], maps[0, 5, 7] = 3.0, 2.0, 1.0, 0.5
    np.testing.assert_allclose(read_joints(maps, 3), [[(3 + 10 + 5) / 6], [(6 + 4 + 4) / 6]])
    assert read_joints(maps, 100).shape == (2, 1)


# --- PCK ----------------------------------------------------------------------------------------------------


def test_the_truth_is_perfect() -> None:
    for strict, first in ((False, False), (True, True)):
        assert (pck([errors(clip(), clip(), first_frame=first, strict=strict)]) == 1).all()


def test_more_is_right_at_larger_thresholds_wherever_the_picture_is() -> None:
    truth, found = clip(), clip() + np.random.default_rng(1).normal(0, 25, (2, 15, 7)).clip(-19, 60)
    shares = pck([errors(found, truth, first_frame=True, strict=False)])
    assert (np.diff(shares, axis=0) >= 0).all()
    assert 0 < shares[0].mean() < shares[-1].mean()
    moved = [errors(3 * found + 7, 3 * truth + 7, first_frame=True, strict=False)]
    np.testing.assert_array_equal(pck(moved), shares)


def test_the_formula() -> None:
    truth = np.zeros((2, 3, 2))
    truth[:, 1], truth[:, 2] = [[30, 30], [40, 40]], [[10, 10], [5, 5]]
    found = truth.copy()
    found[0, 2] += 6  # the box is 30 x 40, its diagonal 50, its size 30
    measured = errors(found, truth, first_frame=False, strict=False)
    assert np.isnan(measured[:, 0]).all()
    np.testing.assert_allclose(measured[:, 1], [0, 0, 0.2])
    np.testing.assert_array_equal(pck([measured])[:2], [[1, 1, 0], [1, 1, 1]])


def test_lost_joints_are_skipped_and_leave_the_box() -> None:
    truth, found = clip(), clip() + 40.0
    found[:, 4] = -1
    measured = errors(found, truth, first_frame=True, strict=False)
    assert np.isnan(measured[4]).all()
    rest = [j for j in range(15) if j != 4]
    np.testing.assert_allclose(measured[rest], errors(found[:, rest], truth[:, rest], first_frame=True, strict=False))
    shares = pck([measured])
    assert np.isnan(shares[:, 4]).all()
    assert not np.isnan(shares[:, rest]).any()


def test_only_the_strict_rule_skips_the_left_border() -> None:
    truth, found = clip(), clip()
    found[0, 2] = 0
    assert not np.isnan(errors(found, truth, first_frame=True, strict=False)).any()
    assert np.isnan(errors(found, truth, first_frame=True, strict=True)[2]).all()


def test_frames_without_a_box_are_skipped() -> None:
    truth = clip()
    truth[:, :, 3] = 50.0  # all joints in one place
    found = truth.copy()
    found[:, :, 5] = -1  # all lost
    measured = errors(found, truth, first_frame=True, strict=False)
    assert np.isnan(measured).all(0).tolist() == [False, False, False, True, False, True, False]
    assert (pck([measured]) == 1).all()


def test_clips_are_pooled_before_joints_are_averaged() -> None:
    right, wrong = np.zeros((2, 30)), np.full((2, 10), 9.0)
    assert pck([right, wrong], THRESHOLDS)[0].tolist() == [0.75, 0.75]
