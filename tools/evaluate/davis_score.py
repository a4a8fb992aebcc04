"""Scores of DAVIS label maps: from memory or from a folder of PNG files, with the official tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.datasets.davis import MaskedVideo, Year, label_map
from clipmill.tools.davis_metrics import VOID, mean_recall_decay, num_objects, sequence_measures
from clipmill.tools.evaluate.evaluator import write_atomic, write_csv

GLOBAL, PER_OBJECT = "global_results-{split}.csv", "per-sequence_results-{split}.csv"  # names of the official toolkit
OBJECTS, SEQUENCES = "objects.csv", "sequences.csv"
NUMBERS = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
LEAST_FRAMES = 3


def truths(video: MaskedVideo, year: Year) -> list[np.ndarray]:
    """The ground truth of every frame, all of one size; raises ValueError where it cannot be scored."""
    if len(video.masks) < LEAST_FRAMES:
        raise ValueError(
            f"{video.masks[0].parent}: {len(video.masks)} masks; the first and the last frame are not scored, "
            f"so a sequence needs {LEAST_FRAMES} (test splits have one: use --no-score)"
        )
    found = [label_map(path, year) for path in video.masks]
    for path, ids in zip(video.masks, found, strict=True):
        if ids.shape != found[0].shape:
            raise ValueError(f"{path}: {_size(ids)} pixels, the first mask has {_size(found[0])}")
    if not num_objects(found[0]):
        raise ValueError(f"{video.masks[0]}: no object in the first mask; take the sequence off the list")
    return found


def predictions(folder: Path, video: MaskedVideo, truth: Sequence[np.ndarray], year: Year) -> list[np.ndarray]:
    """Label maps from ``folder/SEQUENCE/FRAME.png`` of all scored frames, empty ones in place of the first and last.

    Raises ValueError, naming the file, for one that is missing, no label map, or of another size.
    """
    found = [np.zeros_like(ids) for ids in truth]
    for number in range(1, len(truth) - 1):
        path = folder / video.name / video.masks[number].name
        found[number] = one = label_map(path, year)
        if one.shape != truth[number].shape:
            raise ValueError(
                f"{path}: {_size(one)} pixels, the ground truth has {_size(truth[number])}; write masks at that size"
            )
    return found


def _size(ids: np.ndarray) -> str:
    return f"{ids.shape[1]}x{ids.shape[0]}"


def object_rows(video: MaskedVideo, truth: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """One row of official numbers per object, named ``SEQUENCE_ID``."""
    try:
        curves = sequence_measures(truth, found)
    except ValueError as error:
        raise ValueError(f"{video.name}: {error}") from error
    rows = []
    for number, (region, edge) in enumerate(zip(curves.region, curves.boundary, strict=True), 1):
        values = (*mean_recall_decay(region), *mean_recall_decay(edge))
        named = dict(zip(NUMBERS, values, strict=True))
        rows.append({"object": f"{video.name}_{number}", "sequence": video.name, **named})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The seven official numbers: means over objects, not over sequences."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in NUMBERS}
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}


def sequence_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sequence: the means over its objects."""
    table = []
    for name in dict.fromkeys(row["sequence"] for row in rows):
        own = [row for row in rows if row["sequence"] == name]
        table.append({"sequence": name, "objects": len(own), **summary(own)})
    return table


def write_tables(out: Path, rows: Sequence[dict[str, Any]], split: str) -> list[str]:
    """The toolkit's two tables with its three decimals, and all numbers by object and by sequence; their names."""
    whole = summary(rows)
    lines = [",".join(whole), ",".join(f"{value:.3f}" for value in whole.values())]
    names = [GLOBAL.format(split=split), PER_OBJECT.format(split=split), OBJECTS, SEQUENCES]
    write_atomic(out / names[0], ("\n".join(lines) + "\n").encode())
    lines = ["Sequence,J-Mean,F-Mean", *(f"{row['object']},{row['J-Mean']:.3f},{row['F-Mean']:.3f}" for row in rows)]
    write_atomic(out / names[1], ("\n".join(lines) + "\n").encode())
    write_csv(out / OBJECTS, rows)
    write_csv(out / SEQUENCES, sequence_rows(rows))
    return names


def opening(video: MaskedVideo, year: Year) -> np.ndarray:
    """The first mask as what is propagated: void is background. Raises ValueError if no object is in it."""
    ids = label_map(video.masks[0], year)
    ids = np.where(ids == VOID, 0, ids).astype(np.uint8)
    if not ids.any():
        raise ValueError(f"{video.masks[0]}: no object in the first mask; take the sequence off the list")
    return ids
