"""From class scores of a test set to a report: metrics, a table by class, a row per record, a confusion picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.evaluator import write_csv
from clipmill.tools.evaluate.pictures import confusion_picture
from clipmill.tools.metrics import confusion_matrix, mean_class_accuracy, top_classes, topk_accuracy

SAMPLES_FILE = "samples.csv"
CONFUSION_FILE = "confusion.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """metrics, rows (one per class) and artefacts of a `Report`."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    artefacts: list[str]


def classification(scores_NK: np.ndarray, index: ShardIndex, classes: Sequence[str], out: Path) -> Outcome:
    """Score a test set and write ``samples.csv`` and ``confusion.png`` to ``out``.

    scores_NK: class scores of the records of ``index``, raw or probabilities. classes: K names. Metrics are top-1,
    top-5 (with more than 5 classes) and mean class accuracy, as fractions of 1.
    """
    labels = index.column("label").astype(np.int64)
    order = top_classes(scores_NK, scores_NK.shape[1])
    predictions = order[:, 0]
    metrics = {"top1": topk_accuracy(scores_NK, labels, 1)}
    if len(classes) > 5:
        metrics["top5"] = topk_accuracy(scores_NK, labels, 5)
    metrics["mean_class_accuracy"] = mean_class_accuracy(predictions, labels)
    matrix = confusion_matrix(predictions, labels, len(classes))
    write_csv(out / SAMPLES_FILE, _samples(scores_NK, order, labels, index, classes))
    confusion_picture(out / CONFUSION_FILE, matrix, classes)
    return Outcome(metrics=metrics, rows=class_rows(matrix, classes), artefacts=[SAMPLES_FILE, CONFUSION_FILE])


def class_rows(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class that is true or predicted: records, top-1 and the class it is most often taken for."""
    rows = []
    for number, name in enumerate(classes):
        records, predicted = int(matrix[number].sum()), int(matrix[:, number].sum())
        if records == 0 and predicted == 0:
            continue
        wrong = matrix[number].copy()
        wrong[number] = 0
        taken_for = classes[int(wrong.argmax())] if wrong.any() else ""
        rows.append(
            {
                "class": name,
                "records": records,
                "predicted": predicted,
                "top1": int(matrix[number, number]) / records if records else 0.0,
                "taken_for": taken_for,
            }
        )
    return rows


def _samples(
    scores_NK: np.ndarray, order: np.ndarray, labels: np.ndarray, index: ShardIndex, classes: Sequence[str]
) -> list[dict[str, Any]]:
    ranks = (order == labels[:, None]).argmax(1)
    keys, uids = index.column("key"), index.column("uid")
    return [
        {
            "key": keys[i],
            "uid": f"{int(uids[i]):016x}",
            "label": int(labels[i]),
            "class": classes[labels[i]],
            "predicted": classes[order[i, 0]],
            "correct": int(ranks[i] == 0),
            "rank": int(ranks[i]) + 1,
            "score": f"{scores_NK[i, order[i, 0]]:.6g}",
        }
        for i in range(len(labels))
    ]
