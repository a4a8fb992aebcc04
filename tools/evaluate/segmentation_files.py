"""Files of action segmentation corpora: labels frame by frame, splits, recognised labels (the layout of MS-TCN).

::

    groundTruth/VIDEO.txt             a class name per frame and row
    mapping.txt                       rows `number name`, numbers from 0
    splits/train.split1.bundle        rows `VIDEO.txt`; also test.split1.bundle, ... for every split
    features/VIDEO.npy                (D, T) float32, optional
    results/split_1/VIDEO             the rows `### Frame level recognition: ###` and names parted by blanks

Breakfast, 50Salads and GTEA come in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from clipmill.datasets.files import read_lines
from clipmill.tools.evaluate.evaluator import write_atomic

HEADER = "### Frame level recognition: ###"
_SPLIT = re.compile(r"(train|test)\.split(\d+)\.bundle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An annotated corpus. classes: names by number. splits: {number: (training videos, test videos)}."""

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]]

    @property
    def videos(self) -> list[str]:
        """All videos of all splits, sorted."""
        return sorted({video for pair in self.splits.values() for part in pair for video in part})

    def truth(self, video: str) -> np.ndarray:
        """(T,) class numbers of a video's frames."""
        path = self.root / "groundTruth" / f"{video}.txt"
        return numbers_of([text.strip() for _, text in read_lines(path)], self.classes, path)


def read_layout(root: Path) -> Layout:
    """Read classes and splits below ``root``; ValueError for what is missing or malformed."""
    return Layout(root=root, classes=read_mapping(root / "mapping.txt"), splits=read_splits(root / "splits"))


def read_mapping(path: Path) -> tuple[str, ...]:
    """Class names by number."""
    names: dict[int, str] = {}
    for row, text in read_lines(path):
        hit = re.fullmatch(r"\s*(\d+)\s+(\S+)\s*", text)
        if hit is None or int(hit[1]) in names:
            raise ValueError(f"{path} row {row}: {text!r} is not `number name` with a new number; correct it")
        names[int(hit[1])] = hit[2]
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: class numbers must run from 0 without a gap, they are {sorted(names)}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path}: two classes have the same name; make names unique")
    return tuple(names[number] for number in range(len(names)))


def read_splits(folder: Path) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{number: (training videos, test videos)} of all pairs of bundles in a folder."""
    found: dict[int, dict[str, tuple[str, ...]]] = {}
    for path in sorted(folder.glob("*.bundle")):
        if hit := _SPLIT.fullmatch(path.name):
            names = tuple(Path(text.strip()).name.removesuffix(".txt") for _, text in read_lines(path))
            found.setdefault(int(hit[2]), {})[hit[1]] = names
    whole = {number: (parts["train"], parts["test"]) for number, parts in sorted(found.items()) if len(parts) == 2}
    if not whole:
        raise ValueError(f"{folder}: no pair train.split1.bundle and test.split1.bundle there; name the labels' folder")
    for number, (train, test) in whole.items():
        if both := sorted(set(train) & set(test)):
            raise ValueError(f"{folder}: split {number} both trains and tests on {both[0]!r}; correct the lists")
    return whole


def numbers_of(names: Sequence[str], classes: Sequence[str], where: Path) -> np.ndarray:
    """Class numbers of names; ValueError naming the first unknown one."""
    table = _table(tuple(classes))
    unknown = next((name for name in names if name not in table), None)
    if unknown is not None:
        raise ValueError(f"{where}: class {unknown!r} is not in mapping.txt; add it or use the mapping of this corpus")
    return np.array([table[name] for name in names], np.int64)


@cache
def _table(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def write_recognition(path: Path, labels_T: np.ndarray, classes: Sequence[str]) -> None:
    """Write the labels of a video's frames as the field's scripts read them."""
    names = " ".join(classes[int(label)] for label in labels_T)
    write_atomic(path, f"{HEADER}\n{names}".encode("utf-8", "surrogateescape"))


def read_recognition(path: Path, classes: Sequence[str]) -> np.ndarray:
    """(T,) class numbers of a file of recognised labels, whoever wrote it."""
    rows = [text for _, text in read_lines(path)]
    if len(rows) != 2:
        raise ValueError(f"{path}: expected a header and one row of class names, got {len(rows)} rows")
    return numbers_of(rows[1].split(), classes, path)


def match_records(keys: Sequence[str], videos: Sequence[str], where: Path) -> list[int]:
    """The record number of each video: its name is the record's key, that key with ``_`` for ``/``, or its last part.

    ValueError for a video with no record or several.
    """
    tables: list[dict[str, list[int]]] = [{}, {}, {}]
    for number, key in enumerate(keys):
        for table, name in zip(tables, (key, key.replace("/", "_"), key.rpartition("/")[2]), strict=True):
            table.setdefault(name, []).append(number)
    found = []
    for video in videos:
        hits = next((table[video] for table in tables if video in table), [])
        if len(hits) != 1:
            what = f"{len(hits)} records fit" if hits else "no record fits"
            raise ValueError(f"{where}: {what} the video {video!r}; pack the videos under the names of their labels")
        found.append(hits[0])
    return found
