"""Files of temporal action localisation: annotations, detections, proposals and features in the common formats.

Annotations are ActivityNet's (``{"database": {ID: {"duration", "subset", "annotations": [{"segment", "label"}]}}}``) or
mmaction's (``{"v_ID": {"duration_second", "duration_frame", "annotations", ...}}``); results are ActivityNet's
(``{"results": {ID: [{"label", "score", "segment"}]}}``), with seconds; features are a CSV per video, ``v_ID.csv``,
with a header f0, f1, ... and one row per point in time. Ids are used without ``v_`` here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.datasets.files import SPLITS
from clipmill.tools.evaluate.evaluator import write_atomic
from clipmill.tools.localisation_metrics import Labelled

VERSION = "VERSION 1.3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotated:
    """A video: its length, 0 = unknown; its subset (train, val, test or what the file says); (G,) labels, (G, 2) s."""

    duration_s: float
    num_frames: int
    subset: str
    labels: np.ndarray
    segments: np.ndarray


def bare(name: str) -> str:
    """A video's id: the last part of a path, without ``v_``.

    >>> bare("val/v_abc")
    'abc'
    """
    return name.rpartition("/")[2].removeprefix("v_")


def read_truth(*paths: Path) -> dict[str, Annotated]:
    """{id: what is annotated} of one or more files; a video without a subset takes it from its file's name."""
    found: dict[str, Annotated] = {}
    for path in paths:
        data = _json(path)
        entries = data.get("database", data)
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: expected videos by name, or a database of them")
        word = next((SPLITS[part] for part in path.stem.lower().replace("-", "_").split("_") if part in SPLITS), "")
        for name, entry in entries.items():
            if bare(name) in found:
                raise ValueError(f"{path}: video {name!r} is annotated twice; give every video in one file")
            found[bare(name)] = _annotated(entry, word, f"{path}: video {name!r}")
    return found


def _annotated(entry: Any, subset: str, where: str) -> Annotated:
    try:
        rows = entry.get("annotations", [])
        segments = np.array([row["segment"] for row in rows], np.float64).reshape(-1, 2)
        name = str(entry.get("subset", subset))
        return Annotated(
            duration_s=float(entry.get("duration", entry.get("duration_second", 0.0))),
            num_frames=int(entry.get("duration_frame", 0)),
            subset=SPLITS.get(name, name),
            labels=np.array([str(row["label"]) for row in rows], object),
            segments=segments,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not annotated with segments [start, end] and labels ({error!r})") from error


def _json(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); give the file of annotations or results") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    return data


def read_results(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{id: (labels (P,), segments (P, 2), scores (P,))}; a proposal's label is empty."""
    results = _json(path).get("results")
    if not isinstance(results, dict):
        raise ValueError(f"{path}: no results in it; give a file in ActivityNet's format of results")
    found = {}
    for name, rows in results.items():
        try:
            labels = np.array([str(row.get("label", "")) for row in rows], object)
            segments = np.array([row["segment"] for row in rows], np.float64).reshape(-1, 2)
            scores = np.array([row["score"] for row in rows], np.float64)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the results of {name!r} need score and segment ({error!r})") from error
        found[bare(name)] = labels, segments, scores
    return found


def read_detections(path: Path) -> Labelled:
    """Labelled segments with scores of all videos of a file of results."""
    return Labelled.of(read_results(path))


def write_results(path: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write {id: rows of label, score and segment} as ActivityNet's file of results."""
    text = json.dumps({"version": VERSION, "results": rows, "external_data": {}}, indent=1)
    write_atomic(path, f"{text}\n".encode())


def write_features(path: Path, x_TD: np.ndarray) -> None:
    """Write features as CSV with 4 decimals."""
    head = ",".join(f"f{number}" for number in range(x_TD.shape[1]))
    lines = [",".join(f"{value:.4f}" for value in row) for row in x_TD.tolist()]
    write_atomic(path, "\n".join([head, *lines, ""]).encode())


def read_features(path: Path) -> np.ndarray:
    """(T, D) float64 from a CSV with a header."""
    try:
        x = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give features of all annotated videos") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers ({error}); write the features again") from error
    if not x.size:
        raise ValueError(f"{path}: no features in it; write them again")
    return x


# --- moments ------------------------------------------------------------------------------------------------


def snippets(num_frames: int, interval: int = 16) -> np.ndarray:
    """Frame numbers in the middle of every interval, as far as the video goes.

    >>> snippets(40).tolist()
    [8, 24]
    """
    return np.arange(interval // 2, num_frames, interval)


def corrected_s(num_frames: int, duration_s: float, interval: int = 16) -> float:
    """Length of the part of a video that whole intervals cover, in seconds: what features' time runs over."""
    if num_frames < interval:
        return duration_s
    return num_frames // interval * interval / num_frames * duration_s
