"""Resizing as OpenCV does it, and the two ways of cutting patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipmill.tools import tracker_crops
from clipmill.tools.tracker_crops import KINDS, Resampling, crop_inside, crop_padded, mean_colour, paste, resize

GREY = np.array([7, 8, 9], np.uint8)
SIZES = [((5, 7), (12, 9)), ((40, 31), (17, 30)), ((20, 20), (20, 41)), ((1, 6), (5, 3)), ((24, 24), (12, 12))]


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def by_torch(picture: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    align = {} if mode in ("nearest", "area") else {"align_corners": False}
    return F.interpolate(x, size, mode=mode, **align)[0].permute(1, 2, 0).round().clamp(0, 255).numpy()


@pytest.mark.parametrize(("kind", "mode"), [("linear", "bilinear"), ("cubic", "bicubic"), ("nearest", "nearest")])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_against_torch(kind: Resampling, mode: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    picture = noise(*source)
    found = resize(picture, *target, kind).astype(float)
    assert np.abs(found - by_torch(picture, target, mode)).max() <= (0 if kind == "nearest" else 1)


def test_area_averages() -> None:
    picture = noise(24, 36)
    found = resize(picture, 8, 12, "area").astype(float)
    assert np.abs(found - picture.reshape(8, 3, 12, 3, 3).mean((1, 3))).max() <= 0.5 + 1e-3
    uneven = resize(picture, 24, 10, "area").astype(float)  # 3.6 pixels make one
    weights = np.clip(np.minimum(np.arange(1, 37), 3.6) - np.arange(36), 0, 1)
    np.testing.assert_allclose(uneven[:, 0], np.einsum("hwc,w->hc", picture, weights) / 3.6, atol=0.51)


@pytest.mark.parametrize("kind", KINDS)
def test_one_colour_stays(kind: Resampling) -> None:
    picture = np.tile(np.array([3, 128, 255], np.uint8), (9, 13, 1))
    for size in ((4, 40), (9, 13), (30, 5)):
        assert (resize(picture, *size, kind) == picture[0, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_same_size_is_the_same_picture(kind: Resampling) -> None:
    picture = noise(11, 8)
    np.testing.assert_array_equal(resize(picture, 11, 8, kind), picture)


def test_lanczos_keeps_a_slow_wave() -> None:
    wave = lambda n: 128 + 100 * np.cos(2 * np.pi * 3 * (np.arange(n) + 0.5) / n)  # noqa: E731
    picture = np.repeat(np.repeat(wave(48)[None, :, None], 8, 0), 3, 2).round().astype(np.uint8)
    middle = slice(24, -24)
    for kind, most in (("lanczos", 2.0), ("nearest", 30.0)):
        error = np.abs(resize(picture, 8, 144, kind)[4, middle, 0] - wave(144)[middle]).max()
        assert error <= most
        assert kind == "lanczos" or error > 2.0  # the check can tell


@pytest.mark.parametrize("kind", KINDS)
def test_against_opencv(kind: Resampling) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; only this comparison needs it")
    names = {"lanczos": cv2.INTER_LANCZOS4}
    flag = names.get(kind, getattr(cv2, f"INTER_{kind.upper()}", None))
    rng = np.random.default_rng(1)
    for number in range(40):
        source, target = rng.integers(1, 90, 2), rng.integers(1, 90, 2)
        if number % 8 == 0:
            source = target * 2
        picture = noise(*source.tolist(), seed=number)
        expected = cv2.resize(picture, (int(target[1]), int(target[0])), interpolation=flag).astype(int)
        found = resize(picture, int(target[0]), int(target[1]), kind).astype(int)
        assert np.abs(found - expected).max() <= (0 if kind in ("linear", "nearest") else 1)


# --- patches ------------------------------------------------------------------------------------------------


def test_mean_colour() -> None:
    picture = noise(17, 9)
    np.testing.assert_array_equal(mean_colour(picture), np.rint(picture.mean((0, 1))))


@pytest.mark.parametrize("cut", [crop_inside, crop_padded])
def test_a_patch_in_pixels_is_a_slice(cut) -> None:
    picture = noise(60, 80)
    patch = cut(picture, (29.5, 39.5), 20.0, 20, GREY)  # rows 20 ... 39 in both roundings
    rows = slice(20, 40) if cut is crop_padded else slice(round(19.5), round(39.5))
    columns = slice(30, 50) if cut is crop_padded else slice(round(29.5), round(49.5))
    np.testing.assert_array_equal(patch, picture[rows, columns])


@pytest.mark.parametrize("cut", [crop_inside, crop_padded])
def test_what_lies_outside_is_border(cut) -> None:
    picture = np.full((40, 40, 3), 200, np.uint8)
    patch = cut(picture, (0.0, 20.0), 20.0, 40, GREY)
    assert (patch[:18] == GREY).all()
    assert (patch[22:] == 200).all()
    assert patch.shape == (40, 40, 3)


def test_wholly_outside() -> None:
    picture = np.full((40, 40, 3), 200, np.uint8)
    for centre in ((-50.0, 20.0), (20.0, 500.0), (1e6, -1e6)):
        assert not crop_inside(picture, centre, 20.0, 16, GREY).any()
        assert (crop_padded(picture, centre, 20.0, 16, GREY) == GREY).all()


@pytest.mark.parametrize("seed", range(12))
def test_any_place_and_size_works(seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = noise(30, 50, seed=seed)
    for _ in range(30):
        centre, side = (float(rng.uniform(-40, 70)), float(rng.uniform(-40, 90))), float(rng.uniform(0, 120))
        for cut in (crop_inside, crop_padded):
            patch = cut(picture, centre, side, 23, GREY)
            assert patch.shape == (23, 23, 3)
            assert patch.dtype == np.uint8


def test_paste() -> None:
    target = np.zeros((4, 5, 3), np.uint8)
    paste(target, np.full((3, 3, 3), 9, np.uint8), -1, 3)
    expected = np.zeros((4, 5), np.uint8)
    expected[:2, 3:] = 9
    np.testing.assert_array_equal(target[..., 0], expected)
    paste(target, np.full((9, 9, 3), 5, np.uint8), -2, -2)
    assert (target == 5).all()


def test_weights_of_every_kind_sum_to_one() -> None:
    for kind in KINDS[1:]:
        for length, out in ((7, 19), (19, 7), (5, 5)):
            matrix = tracker_crops._matrix(length, out, kind, out < length)
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
