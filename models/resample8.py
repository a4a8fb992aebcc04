"""Rotating, resizing and padding 8-bit pictures to the same numbers as OpenCV, on any device.

Augmentations of released code are made of OpenCV calls on 8-bit pictures; these functions give what they give. A
picture is a tensor (..., H, W) of whole numbers from 0 to 255 of any type; so is every result, of type int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Kernel = Literal["linear", "cubic", "lanczos4"]
_BITS = 11  # behind the point, of OpenCV's weights
_PLACE_BITS = 10  # of its coordinates


class Window(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


# --- padding ------------------------------------------------------------------------------------------------


def mirrored(length: int, before: int, after: int) -> np.ndarray:
    """Source of every place of a padded line: mirrored at the first pixel in front, behind the last one at the end.

    >>> mirrored(3, 2, 2).tolist()
    [2, 1, 0, 1, 2, 2, 1]
    """
    front = np.pad(np.arange(length), (before, 0), "reflect" if length > 1 else "edge")[:before]
    return np.concatenate([front, np.pad(np.arange(length), (0, after), "symmetric")])


def padded(x: Tensor, height: int, width: int) -> Tensor:
    """Mirror the borders until the picture is at least of this size; the smaller half goes to the top and the left."""
    rest_y, rest_x = max(height - x.shape[-2], 0), max(width - x.shape[-1], 0)
    rows = _index(mirrored(x.shape[-2], rest_y // 2, rest_y - rest_y // 2), x)
    columns = _index(mirrored(x.shape[-1], rest_x // 2, rest_x - rest_x // 2), x)
    return x[..., rows[:, None], columns].long()


# --- rotation -----------------------------------------------------------------------------------------------


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Rotate counter-clockwise around the centre by nearest neighbours; what comes into sight is mirrored.

    As OpenCV does it to a picture with borders of its own height and width: coordinates are rounded to 1 / 1024.
    """
    height, width = x.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre_x, centre_y = 1.5 * width, 1.5 * height
    across = np.arange(width, 2 * width)[None, :]
    down = np.arange(height, 2 * height)[:, None]
    shift_x = centre_x - cos * centre_x + sin * centre_y
    shift_y = centre_y - sin * centre_x - cos * centre_y
    columns = _whole(-sin * down + shift_x, cos * across)
    rows = _whole(cos * down + shift_y, sin * across)
    inside = (columns >= 0) & (columns < 3 * width) & (rows >= 0) & (rows < 3 * height)
    rows = mirrored(height, height, height)[rows.clip(0, 3 * height - 1)]
    columns = mirrored(width, width, width)[columns.clip(0, 3 * width - 1)]
    return x[..., _index(rows, x), _index(columns, x)].long() * _index(inside, x)


def _whole(start: np.ndarray, step: np.ndarray) -> np.ndarray:
    one = 1 << _PLACE_BITS
    return (np.rint(start * one).astype(np.int64) + one // 2 + np.rint(step * one).astype(np.int64)) >> _PLACE_BITS


# --- resizing -----------------------------------------------------------------------------------------------


def resized(x: Tensor, height: int, width: int, kernel: Kernel = "linear", window: Window | None = None) -> Tensor:
    """Resize with half-pixel centres and without a low-pass filter; only a window of the result, if one is given.

    linear and lanczos4 compute with weights of 11 bits, as OpenCV does; cubic (Keys, a = -0.75) in full precision.
    """
    top, left, wanted_y, wanted_x = window or (0, 0, height, width)
    rows, down = (part[top : top + wanted_y] for part in taps(x.shape[-2], height, kernel, vertical=True))
    columns, across = (part[left : left + wanted_x] for part in taps(x.shape[-1], width, kernel, vertical=False))
    x = x[..., rows.min() : rows.max() + 1, :]
    rows = rows - rows.min()
    if kernel == "cubic":
        y = _sum(x.double(), columns, across, -1)
        return (_sum(y, rows, down, -2) + (0.5 + 1e-9)).floor().clamp(0, 255).long()
    across, down = (np.rint(weights * np.float32(1 << _BITS)).astype(np.int64) for weights in (across, down))
    y = _sum(x.long(), columns, across, -1)
    if kernel == "linear":
        return (_sum(y >> 4, rows, down, -2, shift=16) + 2) >> 2
    return ((_sum(y, rows, down, -2) + (1 << (2 * _BITS - 1))) >> (2 * _BITS)).clamp(0, 255)


def _sum(x: Tensor, places: np.ndarray, weights: np.ndarray, axis: int, shift: int = 0) -> Tensor:
    """Weighted sum of pixels along an axis; every product is shifted down by ``shift`` bits first."""
    total: Tensor | None = None
    for place, weight in zip(places.T, weights.T, strict=True):
        factor = _index(weight, x) if axis == -1 else _index(weight, x)[:, None]
        product = x.index_select(axis, _index(place, x)) * factor
        product = product >> shift if shift else product
        total = product if total is None else total + product
    assert total is not None
    return total


def taps(length: int, size: int, kernel: Kernel, *, vertical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source pixels and weights of each of ``size`` outputs of a line of ``length`` pixels; both (size, K).

    Pixels beyond the ends are the outermost ones. Weights are float32 (cubic: float64), before rounding to 11 bits.
    """
    place = (np.arange(size) + 0.5) * (1 / (size / length)) - 0.5
    if kernel != "cubic":
        place = place.astype(np.float32)
    first = np.floor(place).astype(np.int64)
    part = place - first.astype(place.dtype)
    if kernel == "linear" and not vertical:  # OpenCV does so along rows only; it shows in how products are cut off
        outside = (first < 0) | (first >= length - 1)
        part = np.where(outside, np.float32(0), part)
    weights = _WEIGHTS[kernel](part)
    count = weights.shape[1]
    places = first[:, None] + np.arange(count) + (1 - count // 2)
    return places.clip(0, length - 1), weights


def _linear(x: np.ndarray) -> np.ndarray:
    return np.stack([1 - x, x], 1)


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.75
    far = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    other = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1
    return np.stack([far, near, other, 1 - far - near - other], 1)


def _lanczos4(x: np.ndarray) -> np.ndarray:
    """sinc(d) * sinc(d / 4) at the distances of eight pixels, made to add up to 1; in float32, as OpenCV."""
    distance = x[:, None] + np.float32(3) - np.arange(8, dtype=np.float32)
    angle = -distance.astype(np.float64) * np.pi / 4
    begin = -(x + np.float32(3)).astype(np.float64) * np.pi / 4
    s45 = math.sqrt(0.5)
    turn = np.array([[1, 0], [-s45, -s45], [0, 1], [s45, -s45], [-1, 0], [s45, s45], [0, -1], [-s45, s45]])
    sine = np.sin(begin)[:, None] * turn[:, 0] + np.cos(begin)[:, None] * turn[:, 1]
    at_pixel = np.abs(distance) < 1e-6
    values = np.where(at_pixel, 1e30, sine / np.where(at_pixel, 1.0, angle * angle)).astype(np.float32)
    total = np.zeros(len(x), np.float32)
    for column in values.T:
        total = total + column
    return values * (np.float32(1) / total)[:, None]


_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"linear": _linear, "cubic": _cubic, "lanczos4": _lanczos4}


def _index(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
