"""Scores shared by evaluators: accuracy over classes, averages over views, nearest neighbours and retrieval.

Everything is numpy and works on whole arrays: N records, K classes, V views, D features, M gallery records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Average = Literal["prob", "score"]
_PAIRS_PER_BLOCK = 1 << 23  # similarities held at a time


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis.

    >>> softmax(np.array([[1000.0, 1000.0]])).tolist()
    [[0.5, 0.5]]
    """
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def average_views(scores_NVK: np.ndarray, how: Average) -> np.ndarray:
    """One row of class scores per record, (N, K), from those of its V views.

    how: ``prob`` averages softmax probabilities, ``score`` averages raw scores (mmaction's ``average_clips``). The two
    rank classes differently when V > 1.
    """
    return (softmax(scores_NVK) if how == "prob" else scores_NVK).mean(1)


def top_classes(scores_NK: np.ndarray, k: int) -> np.ndarray:
    """The k best classes per record, best first, (N, min(k, K)). Among equal scores the larger class number wins.

    >>> top_classes(np.array([[0.5, 0.5, 0.1]]), 2).tolist()
    [[1, 0]]
    """
    return np.argsort(scores_NK, axis=1, kind="stable")[:, ::-1][:, :k]


def topk_accuracy(scores_NK: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of records whose label is among their k best classes (ties as in `top_classes`)."""
    return float((top_classes(scores_NK, k) == np.asarray(labels)[:, None]).any(1).mean())


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64 counts: row = true class, column = predicted class."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def mean_class_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of hits / records of that class.

    The mean runs over the classes that occur among predictions or labels; one that is predicted but never true counts
    as 0, as in mmaction's ``mean_class_accuracy``.

    >>> mean_class_accuracy(np.array([0, 0, 2]), np.array([0, 0, 1]))  # classes 0, 1, 2: 1, 0, 0
    0.3333333333333333
    """
    size = int(max(predictions.max(), labels.max())) + 1
    matrix = confusion_matrix(predictions, labels, size)
    true, predicted = matrix.sum(1), matrix.sum(0)
    accuracy = np.diag(matrix) / np.maximum(true, 1)
    return float(accuracy[(true > 0) | (predicted > 0)].mean())


def unit_rows(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm; a zero row stays zero."""
    norm = np.linalg.norm(x_ND, axis=-1, keepdims=True)
    return x_ND / np.where(norm == 0, 1, norm)


def standardiser(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """shift and scale, (D,): (x - shift) / scale has mean 0 and deviation 1; constant columns keep scale 1."""
    shift, deviation = x_ND.mean(0), x_ND.std(0)
    return shift, np.where(deviation > 1e-6 * (np.abs(shift) + 1e-6), deviation, 1).astype(x_ND.dtype)


def nearest(query_ND: np.ndarray, gallery_MD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows most similar by cosine, nearest first: numbers (N, k') and similarities, k' = min(k, M).

    Equal similarities keep the gallery's order. Works in blocks of queries; never sorts the whole gallery.
    """
    query, gallery = unit_rows(query_ND), unit_rows(gallery_MD)
    k = min(k, len(gallery))
    rows = max(1, _PAIRS_PER_BLOCK // len(gallery))
    numbers = np.empty((len(query), k), np.int64)
    values = np.empty((len(query), k), np.result_type(query, gallery))
    for start in range(0, len(query), rows):
        similarity = query[start : start + rows] @ gallery.T
        floor = np.partition(similarity, len(gallery) - k, axis=1)[:, len(gallery) - k]
        for row, (line, least) in enumerate(zip(similarity, floor, strict=True), start):
            candidates = np.flatnonzero(line >= least)
            numbers[row] = candidates[np.argsort(-line[candidates], kind="stable")[:k]]
            values[row] = line[numbers[row]]
    return numbers, values


def retrieve(
    query_ND: np.ndarray, gallery_MD: np.ndarray, k: int, *, centre: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest`, after subtracting each set's own mean if ``centre``.

    Centring (CoCLR's retrieval) uses statistics of the query set: it is transductive and changes the ranking.
    """
    if centre:
        query_ND, gallery_MD = query_ND - query_ND.mean(0), gallery_MD - gallery_MD.mean(0)
    return nearest(query_ND, gallery_MD, k)


def hit_rates(neighbour_labels_NM: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> list[float]:
    """R@k for every k: the share of queries with their class among their k nearest, which come nearest first.

    A hit rate, not recall in the information-retrieval sense.
    """
    hit = neighbour_labels_NM == np.asarray(labels)[:, None]
    return [float(hit[:, :k].any(1).mean()) for k in ks]
