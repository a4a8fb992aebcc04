"""Measures of temporal action localisation: mAP over tIoU and average recall over the number of proposals.

Equal to the official evaluation of the ActivityNet challenge (F. Caba Heilbron et al., "ActivityNet", CVPR 2015;
AR@AN: V. Escorcia et al., "DAPs", ECCV 2016). Segments are (start, end) in one unit of time; videos and classes are
names or numbers. Results are fractions of 1, areas under AR curves are in percent.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
_POINTS = 100  # of an AR curve

Truth = Mapping[Hashable, np.ndarray]


def tiou(first_A2: np.ndarray, second_B2: np.ndarray) -> np.ndarray:
    """(A, B) temporal intersection over union of two sets of segments; 0 for two segments without length.

    >>> tiou(np.array([[0, 2]]), np.array([[1, 3], [5, 6]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    a, b = np.asarray(first_A2, np.float64)[:, None], np.asarray(second_B2, np.float64)[None]
    inter = (np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])).clip(0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


# --- detection ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Segments with a class, one per row. video, label: (N,). segment: (N, 2). score: (N,), of detections."""

    video: np.ndarray
    label: np.ndarray
    segment: np.ndarray
    score: np.ndarray | None = None

    @staticmethod
    def of(rows: Mapping[str, tuple[np.ndarray, ...]]) -> Labelled:
        """Join {video: (labels, segments) or (labels, segments, scores)}."""
        counts = [len(part[0]) for part in rows.values()]
        columns = [np.concatenate(parts) for parts in zip(*rows.values(), strict=True)]
        video = np.repeat(np.array(list(rows), object), counts)
        return Labelled(
            video=video, label=columns[0], segment=columns[1], score=columns[2] if len(columns) > 2 else None
        )

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionScore:
    """ap: (T, C) average precision by threshold and class. classes: C. unknown: detections of others, left out."""

    ap: np.ndarray
    classes: tuple
    unknown: int

    @property
    def by_threshold(self) -> np.ndarray:
        """(T,) mAP."""
        return self.ap.mean(1)

    @property
    def average(self) -> float:
        """Mean over thresholds."""
        return float(self.by_threshold.mean())


def score_detection(found: Labelled, truth: Labelled, thresholds: Sequence[float] = THRESHOLDS) -> DetectionScore:
    """mAP of detections. A class that is never detected has AP 0; equal scores keep the order of the rows."""
    if not len(truth) or found.score is None:
        raise ValueError("mAP needs true segments, and a score for every detection")
    classes = tuple(np.unique(truth.label).tolist())
    limits = np.asarray(thresholds, np.float64)
    columns = []
    for label in classes:
        mine = np.flatnonzero(found.label == label)
        order = mine[np.argsort(-found.score[mine], kind="stable")]
        actual = np.flatnonzero(truth.label == label)
        right = _right(found.video[order], found.segment[order], truth.video[actual], truth.segment[actual], limits)
        columns.append([_interpolated(row, len(actual)) for row in right])
    unknown = int((~np.isin(found.label, classes)).sum())
    return DetectionScore(ap=np.array(columns).T, classes=classes, unknown=unknown)


def _right(
    video_P: np.ndarray, segment_P2: np.ndarray, true_video_G: np.ndarray, true_G2: np.ndarray, limits_T: np.ndarray
) -> np.ndarray:
    """(T, P) bool: which detections, best first, are true positives at each threshold.

    A detection takes the free true segment of its video with the largest tIoU that reaches the threshold.
    """
    right = np.zeros((len(limits_T), len(video_P)), bool)
    rows_of = _rows(true_video_G)
    for video, rows in _rows(video_P).items():
        actual = rows_of.get(video)
        if actual is None:
            continue
        overlap = tiou(segment_P2[rows], true_G2[actual])
        free = np.ones((len(limits_T), len(actual)), bool)
        for row, line in zip(rows, overlap, strict=True):
            best_first = np.argsort(-line, kind="stable")
            possible = (free & (line >= limits_T[:, None]))[:, best_first]
            hit = np.flatnonzero(possible.any(1))
            free[hit, best_first[possible[hit].argmax(1)]] = False
            right[hit, row] = True
    return right


def _rows(video_N: np.ndarray) -> dict[Hashable, np.ndarray]:
    """{video: its rows, in order}."""
    names, number = np.unique(video_N, return_inverse=True)
    order = np.argsort(number, kind="stable")
    cuts = np.cumsum(np.bincount(number, minlength=len(names)))[:-1] if len(names) else []
    return dict(zip(names.tolist(), np.split(order, cuts), strict=True)) if len(names) else {}


def _interpolated(right_P: np.ndarray, num_truths: int) -> float:
    """Area under the precision-recall curve made monotone (VOC 2011)."""
    true, false = np.cumsum(right_P), np.cumsum(~right_P)
    recall = np.concatenate([[0.0], true / num_truths, [1.0]])
    precision = np.concatenate([[0.0], true / np.maximum(true + false, 1), [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


# --- proposals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalScore:
    """Recall over the average number of proposals per video.

    recall: (T, Q) by threshold and at Q = 100 numbers of proposals. numbers: (Q,) those numbers. average_recall: (Q,).
    auc: area under it in percent, from the first number on and over the last, so that all right is a little below 100.
    """

    recall: np.ndarray
    numbers: np.ndarray

    @property
    def average_recall(self) -> np.ndarray:
        """(Q,) mean over thresholds."""
        return self.recall.mean(0)

    @property
    def auc(self) -> float:
        """Percent."""
        return float(100 * np.trapezoid(self.average_recall, self.numbers) / self.numbers[-1])

    def at(self, number: int) -> float:
        """AR@AN for a whole number of proposals up to 100; the curve must have been made with at most 100 per video."""
        return float(self.average_recall[number - 1])


def score_proposals(
    found: Truth, truth: Truth, *, per_video: float | None = 100.0, thresholds: Sequence[float] = THRESHOLDS
) -> ProposalScore:
    """Average recall of proposals.

    found: {video: (P, 3) start, end, score}, in any order; videos without truth count for nothing. truth: {video:
    (G, 2)}. per_video: R, the most proposals per video on average; None = as many as there are. Every video keeps the
    same share of its proposals, its best.
    """
    mine = {video: found[video] for video in truth if video in found and len(found[video])}
    total, videos = sum(len(rows) for rows in mine.values()), len(truth)
    if not total or not sum(len(rows) for rows in truth.values()):
        raise ValueError("average recall needs true segments, and proposals for some of their videos")
    most = total / videos if per_video is None else per_video
    ratio = most * videos / total
    kept = {video: _best(rows, min(int(len(rows) * ratio), len(rows))) for video, rows in mine.items()}
    total_kept = sum(len(rows) for rows in kept.values())
    if not total_kept:
        raise ValueError(f"{most:g} proposals per video leave none of {total} in {videos} videos; ask for more")
    shares = np.arange(1, _POINTS + 1) / _POINTS * (most * videos / total_kept)
    limits = np.asarray(thresholds, np.float64)
    matched = np.zeros((len(limits), _POINTS))
    for video, rows in kept.items():
        if not len(rows) or not len(truth[video]):
            continue
        best_so_far = np.maximum.accumulate(tiou(truth[video], rows[:, :2]), 1)  # (G, P): tIoU of the best of the first
        counts = np.minimum((len(rows) * shares).astype(np.int64), len(rows))
        reached = np.where(counts > 0, best_so_far[:, np.maximum(counts, 1) - 1], -1.0)  # (G, Q)
        matched += (reached[None] >= limits[:, None, None]).sum(1)
    return ProposalScore(
        recall=matched / sum(len(rows) for rows in truth.values()), numbers=shares * (total_kept / videos)
    )


def _best(rows_P3: np.ndarray, count: int) -> np.ndarray:
    return rows_P3[np.argsort(-rows_P3[:, 2], kind="stable")[:count]]


# --- features of equal length -------------------------------------------------------------------------------


def rescale(x_ND: np.ndarray, points: int = 100, bins: int = 3, how: str = "mean") -> np.ndarray:
    """N feature vectors at equal distances brought to ``points`` (points, D), as BSN and BMN do.

    Row i is the mean (or ``max``) of the piecewise linear interpolation at e + (i + j / bins) a, j = 0 ... bins - 1,
    with e = 1e-4 and a = (N - 1 - 2 e) / points. One vector is repeated.
    """
    x = np.asarray(x_ND, np.float64)
    if len(x) == 1:
        return np.repeat(x, points, 0)
    edge = 1e-4
    pace = (len(x) - 1 - 2 * edge) / points
    place = edge + (np.arange(points)[:, None] + np.arange(bins) / bins) * pace
    low = np.minimum(place.astype(np.int64), len(x) - 2)
    part = (place - low)[..., None]
    values = x[low] * (1 - part) + x[low + 1] * part
    return values.mean(1) if how == "mean" else values.max(1)
