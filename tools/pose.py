"""Joint positions as heat maps and back, and the percentage of correct key points (PCK) on JHMDB.

The arithmetic of the evaluation code shared by TimeCycle, UVC and CRW, and of VFS. Positions are (2, J, T): x and y of
J joints in T frames, in pixels or cells counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
_BOX = 0.6  # of the diagonal of the box around the joints


def heat_map(x: float, y: float, sigma: float, height: int, width: int) -> np.ndarray:
    """A Gaussian of height 1 around a point, (H, W) float32; all zero if its square of 6 sigma lies outside.

    The square is placed at whole pixels by cutting off fractions (towards 0, for negative ones too), so the peak lies
    at ``int(x - 3 sigma) + int(6 sigma + 1) // 2``: the nearest pixel for sigma 0.5, the floor for sigma 4.
    """
    found = np.zeros((height, width), np.float32)
    left, top = int(x - 3 * sigma), int(y - 3 * sigma)
    right, bottom = int(x + 3 * sigma + 1), int(y + 3 * sigma + 1)
    if left >= width or top >= height or right < 0 or bottom < 0:
        return found
    size = 6 * sigma + 1
    offsets = np.arange(0.0, size) - size // 2
    square = np.exp(-(offsets**2 + offsets[:, None] ** 2) / (2 * sigma**2))
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    part = square[max(-top, 0) : min(bottom, height) - top, max(-left, 0) : min(right, width) - left]
    found[rows, columns] = part
    return found


def heat_maps(points_2J: np.ndarray, sigma: float, height: int, width: int, background: bool) -> np.ndarray:
    """One heat map per joint, (J, H, W) float32; ``background`` puts a channel in front that is 1 where all are 0."""
    maps = np.stack([heat_map(x, y, sigma, height, width) for x, y in points_2J.T])
    if not background:
        return maps
    return np.concatenate([(maps.sum(0, keepdims=True) == 0).astype(np.float32), maps])


def read_joints(maps_JHW: Tensor, topk: int) -> np.ndarray:
    """Joint positions (2, J) float64 of heat maps: mean place of the topk highest pixels, weighted by their values.

    A joint whose map is all zero is at (-1, -1).
    """
    width = maps_JHW.shape[2]
    value, place = maps_JHW.flatten(1).topk(min(topk, maps_JHW[0].numel()), 1)
    value, place = value.double(), place.double()
    total = value.sum(1)
    weight = value / torch.where(total == 0, 1, total)[:, None]
    y = torch.div(place, width, rounding_mode="floor")
    found = torch.stack([(weight * (place - y * width)).sum(1), (weight * y).sum(1)])
    return torch.where(total == 0, -1.0, found).cpu().numpy()


# --- PCK ----------------------------------------------------------------------------------------------------


def box_sizes(truth_2JT: np.ndarray, visible_JT: np.ndarray) -> np.ndarray:
    """What distances are divided by in every frame, (T,): 0.6 of the diagonal of the box around the visible joints."""
    low = np.where(visible_JT, truth_2JT, np.inf).min(1)
    high = np.where(visible_JT, truth_2JT, -np.inf).max(1)
    seen = visible_JT.any(0)
    span = np.where(seen, high, 0) - np.where(seen, low, 0)
    return _BOX * np.hypot(span[0], span[1])


def errors(found_2JT: np.ndarray, truth_2JT: np.ndarray, *, first_frame: bool, strict: bool) -> np.ndarray:
    """Distances of all joints, (J, T), divided by the frame's box; NaN where a joint does not count.

    A joint counts if it was found: x >= 0, or with ``strict`` x > 0 (VFS). first_frame: whether frame 0, whose labels
    were given, counts (VFS). A frame whose box has no size does not count.
    """
    visible = found_2JT[0] > 0 if strict else found_2JT[0] >= 0
    size = box_sizes(truth_2JT, visible)
    counts = visible & (size > 0)
    if not first_frame:
        counts[:, 0] = False
    distance = np.hypot(*(found_2JT - truth_2JT))
    return np.where(counts, distance / np.where(size > 0, size, 1), np.nan)


def pck(errors_JT: Iterable[np.ndarray], thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """Share of errors at most as large as each threshold, (thresholds, J), over the frames of all clips together.

    A joint that never counts is NaN.

    >>> pck([np.array([[0.05, np.nan, 0.15, 0.3]])], (0.1, 0.2)).tolist()
    [[0.3333333333333333], [0.6666666666666666]]
    """
    every = np.concatenate(list(errors_JT), 1)
    counted = (~np.isnan(every)).sum(1)
    right = np.array([(every <= threshold).sum(1) for threshold in thresholds])
    return np.where(counted > 0, right / np.maximum(counted, 1), np.nan)
