"""One-pass evaluation of box trackers, as the OTB, pysot and got10k toolkits compute it.

Wu, Lim, Yang, "Online Object Tracking: A Benchmark" (CVPR 2013): success is the share of frames whose overlap with the
truth exceeds a threshold, precision the share whose centre is at most so many pixels off. Boxes are (T, 4) x, y,
width, height. The toolkits differ in what they do with invalid boxes, and in how thresholds are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Toolkit = Literal["otb", "pysot", "got10k"]
TOOLKITS: tuple[Toolkit, ...] = ("otb", "pysot", "got10k")
OVERLAPS = np.arange(21) / 20
ERRORS_PX = np.arange(51)
NORM_ERRORS = np.arange(51) / 100
_OVERLAPS: dict[Toolkit, np.ndarray] = {  # equal in print; apart in the last bit
    "otb": OVERLAPS,
    "pysot": np.arange(0, 1.05, 0.05),
    "got10k": np.linspace(0, 1, 21),
}
_PRECISION_AT_PX, _NORM_PRECISION_AT, _RATE_AT = 20, 20, 10  # places in the curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What a toolkit says of every frame: overlap, centre error in px, and in units of the true box; each (T,).

    A toolkit may mark frames without valid truth by -1: a failure for the overlap, a hit for the errors.
    """

    overlap: np.ndarray
    error_px: np.ndarray
    norm_error: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Success (21,) over overlaps 0 to 1, precision (51,) over 0 to 50 px, normalised precision (51,) over 0 to 0.5."""

    success: np.ndarray
    precision: np.ndarray
    norm_precision: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the success curve; at most 20/21, for no overlap exceeds 1."""
        return float(self.success.mean())

    @property
    def success_rate(self) -> float:
        """Share of frames with an overlap above 0.5."""
        return float(self.success[_RATE_AT])

    @property
    def precision_20px(self) -> float:
        """Share of frames whose centre is at most 20 px off."""
        return float(self.precision[_PRECISION_AT_PX])

    @property
    def norm_precision_20(self) -> float:
        """Share of frames whose centre is at most 0.2 of the true box off."""
        return float(self.norm_precision[_NORM_PRECISION_AT])

    @property
    def norm_auc(self) -> float:
        """Area under the normalised precision curve (TrackingNet)."""
        return float(self.norm_precision.mean())


def frames(truth: np.ndarray, found: np.ndarray, toolkit: Toolkit = "otb") -> Frames:
    """Overlap and errors of every frame.

    The OTB and got10k toolkits take the true box of the first frame for the tracker's. In the OTB toolkit a box that
    is NaN or has no size is a target lost: the previous one counts (``calcSeqErrRobust`` of its MATLAB edition).
    """
    if truth.shape != found.shape or truth.ndim != 2 or truth.shape[1] != 4 or not len(truth):
        raise ValueError(f"truth and found must both be (T, 4) boxes, got {truth.shape} and {found.shape}")
    truth, found = truth.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"otb": _otb, "pysot": _pysot, "got10k": _got10k}[toolkit](truth, found)


def curves(measured: Frames, toolkit: Toolkit = "otb") -> Curves:
    """The curves of one sequence."""
    return Curves(
        success=(measured.overlap[:, None] > _OVERLAPS[toolkit]).mean(0),
        precision=(measured.error_px[:, None] <= ERRORS_PX).mean(0),
        norm_precision=(measured.norm_error[:, None] <= NORM_ERRORS).mean(0),
    )


def score(truth: np.ndarray, found: np.ndarray, toolkit: Toolkit = "otb") -> Curves:
    """The curves of one sequence from its boxes.

    >>> box = np.array([[10.0, 10.0, 20.0, 20.0]])
    >>> found = score(box, box)
    >>> round(found.auc, 3), found.precision_20px
    (0.952, 1.0)
    """
    return curves(frames(truth, found, toolkit), toolkit)


def mean(sequences: Sequence[Curves]) -> Curves:
    """The curves of a set: every sequence counts the same, however long it is."""
    return Curves(
        success=np.mean([one.success for one in sequences], 0),
        precision=np.mean([one.precision for one in sequences], 0),
        norm_precision=np.mean([one.norm_precision for one in sequences], 0),
    )


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (T, 4), row by row; NaN where both are empty.

    >>> overlap(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 2, 2]])).round(3).tolist()
    [0.333]
    """
    both = _intersection(a, b)
    return both / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - both)


def _intersection(a: np.ndarray, b: np.ndarray, pixel: float = 0.0) -> np.ndarray:
    """pixel: 1 for corners on pixel centres, which is the same area but for rounding."""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:] - pixel, b[:, :2] + b[:, 2:] - pixel)
    return np.maximum(high - low + pixel, 0).prod(1)


def _centres(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, :2] + (boxes[:, 2:] - 1) / 2


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a - b) ** 2).sum(1))


# --- the toolkits -------------------------------------------------------------------------------------------


def _otb(truth: np.ndarray, found: np.ndarray) -> Frames:
    """Truth is valid if all four numbers are positive; otherwise the frame is marked in all measures."""
    found = _carried_on(truth, found)
    valid = np.all(truth > 0, 1)
    both = _intersection(found, truth, pixel=1.0)
    share = both / (found[:, 2] * found[:, 3] + truth[:, 2] * truth[:, 3] - both)
    error = np.array([round(value, 4) for value in _distance(_centres(found), _centres(truth)).tolist()])
    norm_error = _distance(_centres(found) / truth[:, 2:], _centres(truth) / truth[:, 2:])
    return Frames(
        overlap=np.where(valid, share, -1.0),
        error_px=np.where(valid, error, -1.0),
        norm_error=np.where(valid, norm_error, -1.0),
    )


def _carried_on(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Boxes with the first one from the truth, and the previous one wherever the target was reported lost."""
    found = found.copy()
    found[0] = truth[0]
    lost = (np.isnan(found).any(1) | np.any(found[:, 2:] <= 0, 1)) & ~np.isnan(truth).any(1)
    for t in range(1, len(found)):
        if lost[t]:
            found[t] = found[t - 1]
    return found


def _pysot(truth: np.ndarray, found: np.ndarray) -> Frames:
    """Truth is valid for the overlap if it has a size, for an error if its centre is positive."""
    sized = np.all(truth[:, 2:] > 0, 1)
    here, there = _centres(truth), _centres(found)
    sides = truth[:, 2:] + 1e-16
    return Frames(
        overlap=np.where(sized, np.clip(overlap(found, truth), 0, 1), -1.0),
        error_px=np.where(np.all(here > 0, 1), _distance(here, there), -1.0),
        norm_error=np.where(np.all(here / sides > 0, 1), _distance(here / sides, there / sides), -1.0),
    )


def _got10k(truth: np.ndarray, found: np.ndarray) -> Frames:
    """Nothing is marked."""
    found = found.copy()
    found[0] = truth[0]
    both = _intersection(found, truth)
    union = found[:, 2] * found[:, 3] + truth[:, 2] * truth[:, 3] - both
    here, there = _centres(truth), _centres(found)
    return Frames(
        overlap=np.clip(both / (union + np.finfo(float).eps), 0, 1),
        error_px=_distance(here, there),
        norm_error=np.sqrt((((here - there) / np.maximum(truth[:, 2:], 1)) ** 2).sum(1)),
    )
