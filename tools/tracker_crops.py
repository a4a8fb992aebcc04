"""Square patches around a target, resized the way OpenCV does it.

Pictures are (H, W, 3) uint8 arrays; places are (y, x) in pixels counted from 0. Linear resizing repeats OpenCV's
fixed-point arithmetic and gives the same bytes; the other four kinds are within a grey level of it. Resizing releases
the GIL.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from clipmill.pipeline.jit import compiled

Resampling = Literal["linear", "cubic", "area", "nearest", "lanczos"]
KINDS: tuple[Resampling, ...] = ("linear", "cubic", "area", "nearest", "lanczos")
_BITS = 11  # of a fixed-point weight
_CUBIC_A = -0.75


# --- resizing -----------------------------------------------------------------------------------------------


def resize(picture_HWC: np.ndarray, height: int, width: int, kind: Resampling = "linear") -> np.ndarray:
    """A picture of another size, uint8, as ``cv2.resize`` makes it."""
    tall, wide = picture_HWC.shape[:2]
    if kind == "linear":
        out = np.empty((height, width, 3), np.uint8)
        _resize_linear(picture_HWC, *_taps(tall, height, False), *_taps(wide, width, True), out)
        return out
    shrinks = tall >= height and wide >= width  # OpenCV averages areas only then
    rows, columns = _matrix(tall, height, kind, shrinks), _matrix(wide, width, kind, shrinks)
    x = np.tensordot(columns, np.tensordot(rows, picture_HWC.astype(np.float32), (1, 0)), (1, 1))
    return np.ascontiguousarray(np.clip(np.rint(x), 0, 255).astype(np.uint8).transpose(1, 0, 2))


@compiled
def _resize_linear(picture, low_y, high_y, weight_y, low_x, high_x, weight_x, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        b0, b1 = weight_y[i, 0], weight_y[i, 1]
        top, bottom = picture[low_y[i]], picture[high_y[i]]
        for j in range(out.shape[1]):
            a0, a1 = weight_x[j, 0], weight_x[j, 1]
            left, right = low_x[j], high_x[j]
            for c in range(3):
                above = (top[left, c] * a0 + top[right, c] * a1) >> 4
                below = (bottom[left, c] * a0 + bottom[right, c] * a1) >> 4
                out[i, j, c] = min(max((((above * b0) >> 16) + ((below * b1) >> 16) + 2) >> 2, 0), 255)


@lru_cache(maxsize=256)
def _taps(length: int, out: int, rest_at_edges: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both neighbours of every new pixel (out,) and their weights (out, 2); at edges one has all of it, or not."""
    place = ((np.arange(out) + 0.5) * _scale(length, out) - 0.5).astype(np.float32)
    low = np.floor(place).astype(np.int64)
    share = place - low.astype(np.float32)
    if rest_at_edges:
        share = np.where((low < 0) | (low >= length - 1), np.float32(0), share)
    weights = np.stack([np.float32(1) - share, share], 1) * np.float32(1 << _BITS)
    return np.clip(low, 0, length - 1), np.clip(low + 1, 0, length - 1), np.rint(weights).astype(np.int32)


def _scale(length: int, out: int) -> float:
    return 1.0 / (out / length)  # with OpenCV's rounding


@lru_cache(maxsize=256)
def _matrix(length: int, out: int, kind: Resampling, shrinks: bool) -> np.ndarray:
    """Weights (out, length) of every source pixel in every new one; rows sum to 1."""
    places, weights = _weights(length, out, kind, shrinks)
    matrix = np.zeros((out, length))
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(places, 0, length - 1).astype(int)), weights)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _weights(length: int, out: int, kind: Resampling, shrinks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source pixels and their weights, both (out, k), of every new pixel; pixels may lie outside."""
    scale = _scale(length, out)  # source pixels that make one
    i = np.arange(out)[:, None]
    if kind == "nearest":
        return np.floor(i * scale), np.ones((out, 1))
    if kind == "area" and shrinks:
        cells = np.floor(i * scale) + np.arange(int(np.ceil(scale)) + 1)
        return cells, np.clip(np.minimum((i + 1) * scale, cells + 1) - np.maximum(i * scale, cells), 0, 1)
    if kind == "area":  # enlarging: linear, but flat in the middle of every source pixel
        low = np.floor(i * scale)
        share = np.maximum((i + 1 - (low + 1) / scale).astype(np.float32), 0) % 1
        return low + np.arange(2), np.concatenate([1 - share, share], 1)
    place = (i + 0.5) * scale - 0.5
    reach = 2 if kind == "cubic" else 4
    cells = np.floor(place) + np.arange(1 - reach, reach + 1)
    return cells, (_cubic if kind == "cubic" else _lanczos)(np.abs(place - cells))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel for distances below 2."""
    near = (_CUBIC_A + 2) * x**3 - (_CUBIC_A + 3) * x**2 + 1
    return np.where(x < 1, near, _CUBIC_A * (x**3 - 5 * x**2 + 8 * x - 4))


def _lanczos(x: np.ndarray) -> np.ndarray:
    """Lanczos' kernel for distances below 4."""
    return np.sinc(x) * np.sinc(x / 4)


# --- patches ------------------------------------------------------------------------------------------------


def mean_colour(picture_HWC: np.ndarray) -> np.ndarray:
    """(3,) uint8, the average colour, rounded."""
    return np.rint(_sum_colour(picture_HWC) / (picture_HWC.shape[0] * picture_HWC.shape[1])).astype(np.uint8)


@compiled
def _sum_colour(picture):  # type: ignore[no-untyped-def]
    total = np.zeros(3, np.int64)
    for i in range(picture.shape[0]):
        for j in range(picture.shape[1]):
            for c in range(3):
                total[c] += picture[i, j, c]
    return total


def crop_inside(
    picture_HWC: np.ndarray,
    centre_yx: tuple[float, float],
    side: float,
    out: int,
    border: np.ndarray,
    kind: Resampling = "linear",
) -> np.ndarray:
    """The square of ``side`` pixels around a place as (out, out, 3) uint8; VFS's way.

    The part inside the picture is resized by itself, then framed with colour ``border`` (3,); a square wholly outside
    is black.
    """
    half = max(side, 2.0) / 2
    low = [_round(c - half) for c in centre_yx]
    extent = [_round(c + half) - start for c, start in zip(centre_yx, low, strict=True)]
    part = picture_HWC[max(low[0], 0) : max(low[0] + extent[0], 0), max(low[1], 0) : max(low[1] + extent[1], 0)]
    if not part.size:
        return np.zeros((out, out, 3), np.uint8)
    rows, columns = (max(_round(n * out / whole), 1) for n, whole in zip(part.shape, extent, strict=False))
    part = resize(part, rows, columns, kind)
    if rows == columns == out:
        return part
    above, before = (int(max(-start, 0) * out / whole) for start, whole in zip(low, extent, strict=True))
    framed = np.tile(border.astype(np.uint8), (out, out, 1))
    framed[above : above + rows, before : before + columns] = part
    return framed


def crop_padded(
    picture_HWC: np.ndarray,
    centre_yx: tuple[float, float],
    side: float,
    out: int,
    border: np.ndarray,
    kind: Resampling = "linear",
) -> np.ndarray:
    """The square of ``side`` pixels around a place as (out, out, 3) uint8; siamfc-pytorch's way.

    The picture is framed with colour ``border`` (3,) as far as needed, then cut, then resized.
    """
    length = max(_round(side), 1)
    square = np.tile(border.astype(np.uint8), (length, length, 1))
    paste(square, picture_HWC, *(-_round(c - (length - 1) / 2) for c in centre_yx))
    return resize(square, out, out, kind)


def paste(target_HWC: np.ndarray, picture_HWC: np.ndarray, top: int, left: int) -> None:
    """Put a picture's upper left corner at (top, left) of another one; what does not fit is cut off."""
    (height, width), (tall, wide) = target_HWC.shape[:2], picture_HWC.shape[:2]
    rows, columns = slice(max(top, 0), max(top + tall, 0)), slice(max(left, 0), max(left + wide, 0))
    part = picture_HWC[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    target_HWC[rows, columns] = part


def _round(x: float) -> int:
    return int(np.rint(x))  # half to even
