"""Measures of frame-wise action segmentation, as the evaluation script of MS-TCN defines them.

Y. Abu Farha, J. Gall, "MS-TCN: Multi-Stage Temporal Convolutional Network for Action Segmentation", CVPR 2019; C. Lea
et al., "Temporal Convolutional Networks for Action Segmentation and Detection", CVPR 2017 (edit score and F1@k). A
labelling is (T,) class numbers or names, one per frame. All scores are in percent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

OVERLAPS = (0.10, 0.25, 0.50)


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of equal labels, in temporal order. label, start, end: (S,); ``end`` is exclusive."""

    label: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


def segments(labels_T: np.ndarray, background: Collection = ()) -> Segments:
    """The maximal runs of equal labels; runs of a background label are left out.

    >>> found = segments(np.array([0, 0, 3, 3, 3, 1]), background=(0,))
    >>> found.label.tolist(), found.start.tolist(), found.end.tolist()
    ([3, 1], [2, 5], [5, 6])
    """
    labels = np.asarray(labels_T)
    start = np.flatnonzero(np.concatenate([[len(labels) > 0], labels[1:] != labels[:-1]]))
    end = np.concatenate([start[1:], [len(labels)]])[: len(start)]
    keep = ~np.isin(labels[start], list(background)) if len(background) else np.ones(len(start), bool)
    return Segments(labels[start][keep], start[keep], end[keep])


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements, each of cost 1.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        corner, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (one != other))
    return row[-1]


def edit_score(found: Segments, truth: Segments) -> float:
    """100 (1 - distance / length of the longer) of two sequences of segment labels; 100 if both are empty."""
    longer = max(len(found), len(truth))
    if longer == 0:
        return 100.0
    return 100.0 * (1 - edit_distance(found.label.tolist(), truth.label.tolist()) / longer)


def matches(found: Segments, truth: Segments, overlap: float) -> tuple[int, int, int]:
    """True positives, false positives and false negatives of one video.

    Each found segment, in temporal order, takes the true segment of its label with the largest IoU (the first of equal
    ones). It is right if that IoU reaches ``overlap`` and the segment is not taken yet; it never tries another. With no
    true segment every found one is wrong.
    """
    taken = np.zeros(len(truth), bool)
    for label, start, end in zip(found.label, found.start, found.end, strict=True):
        if len(truth) == 0:
            break
        inter = np.minimum(end, truth.end) - np.maximum(start, truth.start)
        union = np.maximum(end, truth.end) - np.minimum(start, truth.start)
        iou = np.where(truth.label == label, inter / union, 0.0)
        best = int(iou.argmax())
        if iou[best] >= overlap:
            taken[best] = True  # a second hit of the same segment adds nothing, so it counts as wrong below
    right = int(taken.sum())
    return right, len(found) - right, len(truth) - right


def f1(right: float, wrong: float, missed: float) -> float:
    """100 times the harmonic mean of precision and recall; 0 where nothing is right."""
    return 100.0 * 2 * right / (2 * right + wrong + missed) if right else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationScore:
    """Scores of a set of videos in percent.

    mof: right frames / all frames, pooled, background included. edit: mean over videos. f1: one per overlap, counts
    pooled over videos. edits: (V,) edit scores. counts: (V, overlaps, 3) true and false positives, false negatives.
    """

    mof: float
    edit: float
    f1: tuple[float, ...]
    edits: np.ndarray
    counts: np.ndarray


def score_segmentation(
    found: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    *,
    background: Collection = (),
    overlaps: Sequence[float] = OVERLAPS,
) -> SegmentationScore:
    """Score V labellings against the true ones, frame by frame of equal lengths.

    background: labels whose segments count for nothing but MoF. Raises ValueError for lengths that differ.
    """
    if not truth or len(found) != len(truth):
        raise ValueError(f"{len(found)} labellings cannot be scored against {len(truth)} true ones")
    right = frames = 0
    edit, counts = [], []
    for number, (one, other) in enumerate(zip(found, truth, strict=True)):
        one, other = np.asarray(one), np.asarray(other)
        if one.shape != other.shape or one.ndim != 1 or not len(one):
            raise ValueError(f"video {number} has {one.shape} found labels and {other.shape} true ones; give T of each")
        right += int((one == other).sum())
        frames += len(one)
        a, b = segments(one, background), segments(other, background)
        edit.append(edit_score(a, b))
        counts.append([matches(a, b, overlap) for overlap in overlaps])
    table = np.array(counts, np.float64)
    return SegmentationScore(
        mof=100.0 * right / frames,
        edit=float(np.mean(edit)),
        f1=tuple(f1(*row) for row in table.sum(0)),
        edits=np.array(edit),
        counts=table,
    )
