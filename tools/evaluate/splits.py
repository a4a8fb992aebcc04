"""Which records of a data set train a classifier and which are scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from clipmill.pipeline.draws import fold, fold_array
from clipmill.pipeline.pack.write import MANIFEST_FILE
from clipmill.pipeline.record import ShardIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which records train a classifier (or are searched) and which are scored."""

    train: str = "train"
    """Name of the training split."""
    test: str = "test"
    """Name of the split that is scored."""
    test_fraction: float | None = None
    """Ignore the corpus's splits and score this share of all records, chosen by a hash of their uid."""
    official: tuple[int, ...] = ()
    """Numbers of the official splits of UCF101 or HMDB51, e.g. 1 2 3: each is evaluated by itself, and the score is
    their mean. Default: the split that the corpus was packed with."""
    labels: float = 1.0
    """Share of every class of the training split that is used (e.g. 0.01: 1 percent of the labels), chosen by a hash
    of the uid; a smaller share is part of a larger one."""
    label_list: Path | None = None
    """File with the training records that are used, one key or file name per row, e.g. SimCLR's 1percent.txt."""


def split(root: Path, options: Splits) -> tuple[ShardIndex, ShardIndex]:
    """(train, test) of a packed data set, all labelled; an unlabelled record is an error that names it."""
    index = ShardIndex.open(root)
    if options.official:
        number, *more = options.official
        if more or options.test_fraction is not None:
            raise ValueError(f"official = {options.official}: give one split at a time, and no test_fraction")
        part = official_parts(index, number)
        parts = index.select(part == "train"), index.select(part == "test")
    elif options.test_fraction is not None:
        if not 0 < options.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {options.test_fraction}")
        test = smallest_hashes(index.column("uid"), options.test_fraction, "test")
        if test.all() or not test.any():
            raise ValueError(f"{root}: {len(index)} records are too few to score a share of {options.test_fraction}")
        parts = index.select(~test), index.select(test)
    else:
        if not np.any(index.column("split") != ""):
            raise ValueError(f"{root}: the records have no splits; give --test-fraction, e.g. 0.25")
        if options.train == options.test:
            raise ValueError(f"training and test split are both {options.train!r}; name two with --train and --test")
        parts = index.split(options.train), index.split(options.test)
    for part in parts:
        require_labels(part)
    return fewer_labels(parts[0], options), parts[1]


def fewer_labels(train: ShardIndex, options: Splits) -> ShardIndex:
    """The part of a training split whose labels are used; every class keeps one record at least."""
    if options.label_list is not None:
        if options.labels != 1.0:
            raise ValueError(f"labels = {options.labels} and label_list = {options.label_list}: give one of them")
        return _listed(train, options.label_list)
    if not 0 < options.labels <= 1:
        raise ValueError(f"labels = {options.labels} is not possible; it must be a share above 0, at most 1")
    if options.labels == 1:
        return train
    label, uid = train.column("label"), train.column("uid")
    mask = np.zeros(len(train), bool)
    for number in np.unique(label):
        rows = np.flatnonzero(label == number)
        share = max(options.labels, 1 / len(rows))
        mask[rows] = smallest_hashes(uid[rows], share, "labels")
    return train.select(mask)


def _listed(train: ShardIndex, path: Path) -> ShardIndex:
    """The records that a list names by key or by file name, with or without its suffix."""
    try:
        rows = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error}); give a list of keys or file names") from error
    wanted = {part for row in rows if (name := row.strip()) for part in (name, name.rpartition(".")[0] or name)}
    mask = np.array([key in wanted or key.rpartition("/")[2] in wanted for key in train.column("key")], bool)
    if not mask.any():
        raise ValueError(f"{path}: none of its rows is a training record of {train.root}; rows are keys or file names")
    return train.select(mask)


def smallest_hashes(uids: np.ndarray, fraction: float, key: str) -> np.ndarray:
    """Mask of round(fraction * N) records: those whose hashed uid is smallest, whatever their order."""
    hashes = fold_array(np.full(len(uids), fold(key), np.uint64), uids.astype(np.uint64))
    mask = np.zeros(len(uids), bool)
    mask[np.argsort(hashes, kind="stable")[: round(fraction * len(uids))]] = True
    return mask


def require_labels(index: ShardIndex) -> None:
    """Raise ValueError for the first record without a class."""
    missing = np.flatnonzero(index.column("label") < 0)
    if len(missing):
        record = index[int(missing[0])]
        raise ValueError(
            f"{index.root}: {len(missing)} of {len(index)} records have no label, the first is {record.key!r}; "
            "pack with labels or choose labelled splits"
        )


def class_names(index: ShardIndex, *more: ShardIndex) -> list[str]:
    """Names by class number, long enough for every label."""
    top = max(int(part.column("label").max()) for part in (index, *more))
    names = list(index.classes)
    return names + [str(number) for number in range(len(names), top + 1)]


def official_parts(index: ShardIndex, number: int) -> np.ndarray:
    """``train``, ``test`` or ``unused`` for every record of ``index`` in official split ``number``, (N,) of str.

    Raises ValueError if the corpus has no such split.
    """
    path = index.root / MANIFEST_FILE
    try:
        columns = parquet.read_table(path, columns=["uid", "extra"]).to_pydict()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; --official reads the splits there") from error
    splits = {uid: json.loads(extra or "{}").get("splits", {}) for uid, extra in zip(*columns.values(), strict=True)}
    found = [splits.get(uid, {}) for uid in index.column("uid").tolist()]
    if not any(str(number) in part for part in found):
        known = sorted({name for part in found for name in part}, key=int)
        has = f"it has {', '.join(known)}" if known else "only UCF101 and HMDB51 with their lists have some"
        raise ValueError(f"{index.root}: no official split {number}; {has}")
    return np.array([part.get(str(number), "unused") for part in found])
