"""Region and boundary measures of video object segmentation, as the DAVIS-2017 evaluation package defines them.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016); Pont-Tuset
et al., "The 2017 DAVIS Challenge on Video Object Segmentation" (arXiv 1704.00675). Label maps are (H, W) integers:
0 is the background, i > 0 is object i, 255 in a ground truth is void.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VOID = 255
THRESHOLD = 0.008  # of the image's diagonal: how far a boundary may be off


# --- one frame ----------------------------------------------------------------------------------------------


def region_similarity(truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None) -> float:
    """J of two boolean masks (H, W): intersection over union outside ``void``; 1 where both are empty.

    >>> region_similarity(np.array([[True, True]]), np.array([[False, True]]))
    0.5
    """
    if void is not None:
        truth, found = truth & ~void, found & ~void
    union = np.count_nonzero(truth | found)
    return float(np.count_nonzero(truth & found) / union) if union else 1.0


def boundary_accuracy(
    truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None, threshold: float = THRESHOLD
) -> float:
    """F of two boolean masks (H, W): harmonic mean of precision and recall of their boundary pixels.

    A boundary pixel is right if the other boundary has a pixel at most `tolerance` away. 1 where both masks have no
    boundary, 0 where only one has.
    """
    if void is not None:
        truth, found = truth & ~void, found & ~void
    radius = tolerance(truth.shape, threshold)
    crop = _around(truth | found)
    truth, found = truth[crop], found[crop]
    of_truth, of_found = _points(boundary(truth)), _points(boundary(found))
    if not len(of_truth[0]) or not len(of_found[0]):
        return float(len(of_truth[0]) == len(of_found[0]))
    precision = _near(of_found, of_truth, radius) / len(of_found[0])
    recall = _near(of_truth, of_found, radius) / len(of_truth[0])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tolerance(shape: Sequence[int], threshold: float = THRESHOLD) -> int:
    """Radius of the boundary match in pixels: ``threshold`` itself from 1 on, else that share of the diagonal.

    >>> tolerance((480, 854)), tolerance((480, 854), 3)
    (8, 3)
    """
    if threshold >= 1:
        return int(threshold)
    return int(np.ceil(threshold * np.linalg.norm(np.array(shape))))


def boundary(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels of a boolean mask (H, W): those unlike the pixel right of, below or right below them.

    In the last row only the pixel to the right counts, in the last column only the one below: the image's border is
    no boundary.
    """
    edge = np.zeros(mask.shape, bool)
    right, below = mask[:, :-1] ^ mask[:, 1:], mask[:-1] ^ mask[1:]
    edge[:, :-1] = right
    edge[:-1] |= below
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def _around(mask: np.ndarray) -> tuple[slice, slice]:
    """The part of the picture outside which a mask has no boundary: its box and a pixel more on every side."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(0))
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _points(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the true pixels, row by row."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def _near(points: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray], radius: int) -> int:
    """How many of ``points`` (rows, columns) have one of ``others`` within Euclidean distance ``radius``.

    The same count as dilating ``others`` by the disc dy^2 + dx^2 <= radius^2: in every row of the disc around a point,
    a running count of ``others`` tells whether there is one between its two ends.
    """
    (rows, columns), margin = others, 2 * radius
    top, left = rows.min() - margin, columns.min() - margin - 1  # one more: a count before the first pixel
    height, width = rows.max() + margin + 1 - top, columns.max() + margin + 1 - left
    count = np.zeros(height * width, np.int32)
    count[(rows - top) * width + columns - left] = 1
    np.cumsum(count, out=count)
    y, x = points[0] - top, points[1] - left
    reachable = (y >= radius) & (y < height - radius) & (x > radius) & (x < width - radius)
    place = y[reachable] * width + x[reachable]
    hit = np.zeros(len(place), bool)
    for dy in range(-radius, radius + 1):
        row, reach = place + dy * width, math.isqrt(radius * radius - dy * dy)
        hit |= count[row + reach] > count[row - reach - 1]
    return int(np.count_nonzero(hit))


# --- one sequence -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """J and F of every object and scored frame, each (objects, frames) float64."""

    region: np.ndarray
    boundary: np.ndarray


def num_objects(first_truth: np.ndarray) -> int:
    """Objects of a sequence: the highest id in its first ground truth, void apart."""
    return int(np.where(first_truth == VOID, 0, first_truth).max())


def frame_measures(truth: np.ndarray, found: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """J and F of objects 1 to ``count`` in one frame, (count,) each; void counts as background."""
    pairs = [(truth == i, found == i) for i in range(1, count + 1)]
    region, edge = ([measure(*pair) for pair in pairs] for measure in (region_similarity, boundary_accuracy))
    return np.array(region, np.float64), np.array(edge, np.float64)


def sequence_measures(truth_THW: Sequence[np.ndarray], found_THW: Sequence[np.ndarray]) -> Curves:
    """J and F of a whole sequence by the rules of the semi-supervised task.

    The first and the last frame are not scored. Objects are those of `num_objects`; one that is never predicted has
    empty masks. Raises ValueError for a prediction with more objects.
    """
    count = num_objects(truth_THW[0])
    scored = range(1, len(truth_THW) - 1)
    most = max((int(found_THW[t].max()) for t in scored), default=0)
    if most > count:
        raise ValueError(f"a prediction has object {most}, but the sequence has {count}; predict only given objects")
    measures = [frame_measures(truth_THW[t], found_THW[t], count) for t in scored]
    region, edge = (np.stack(part, 1) if part else np.empty((count, 0)) for part in zip(*measures, strict=True))
    return Curves(region=region, boundary=edge)


def mean_recall_decay(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, share above 0.5, and how much of the first quarter is lost in the last, of one object's curve (L,).

    NaN is left out of the mean and the decay; in the recall it counts as a miss. Quarters share their end frames.

    >>> mean_recall_decay(np.array([1.0, 1.0, 0.5, 0.5, 0.0]))
    (0.6, 0.4, 0.75)
    """
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    decay = _mean(values[ends[0] : ends[1] + 1]) - _mean(values[ends[3] : ends[4] + 1])
    return _mean(values), float(np.mean(values > 0.5)), decay


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
