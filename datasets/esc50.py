"""ESC-50: 2000 recordings of 50 environmental sounds in five folds."""

from __future__ import annotations

import re
from pathlib import Path

from clipmill.datasets.files import AUDIO_SUFFIXES, find, key_of, read_csv, text_of
from clipmill.datasets.source import Corpus, CorpusError, Source

_NAME = re.compile(r"(?:.*-)?(?P<fold>[1-9])-(?P<source>\d+)-(?P<take>[A-Z])-(?P<target>\d+)")
_COLUMNS = ("filename", "fold", "target", "category")


def read(root: Path, *, lists: str = "meta/esc50.csv", videos: str = "audio") -> Corpus:
    """The recordings that the list names; the split of a recording is ``fold1`` ... ``fold5``.

    lists: CSV file with the columns filename, fold, target and category, below ``root``. videos: folder with the
    recordings. Names of files may carry a category before the fold; the list decides, not the name. Key: the file name
    without its suffix. ``extra`` holds the source recording, which is in one fold only, and whether the class belongs
    to ESC-10. Rows without a file are in ``missing``. Raises CorpusError for a malformed list, a target with two
    names, a source recording in two folds, and if no file is there.
    """
    root = Path(root)
    path = root / lists
    rows = read_csv(path)
    columns = {name: place for place, name in enumerate(rows[0][1])} if rows else {}
    absent = [name for name in _COLUMNS if name not in columns]
    if absent:
        raise CorpusError(f"{text_of(path)}: no column {', '.join(absent)}; give the meta/esc50.csv of the corpus")
    there = {file.rsplit("/", 1)[-1]: file for file in find(root / videos, AUDIO_SUFFIXES)}
    bare = {_bare(name): name for name in there}
    names: dict[int, str] = {}
    fold_of: dict[str, int] = {}
    sources, missing = [], []
    for number, fields in rows[1:]:
        where = f"{text_of(path)} row {number}"
        row = {name: fields[place] for name, place in columns.items() if place < len(fields)}
        try:
            fold, target = int(row["fold"]), int(row["target"])
        except (KeyError, ValueError):
            raise CorpusError(f"{where}: fold and target must be integers; correct the row") from None
        if names.setdefault(target, row["category"]) != row["category"]:
            raise CorpusError(f"{where}: target {target} is {row['category']!r} here and {names[target]!r} above")
        recording = row.get("src_file", "")
        if recording and fold_of.setdefault(recording, fold) != fold:
            raise CorpusError(f"{where}: recording {recording} is in folds {fold_of[recording]} and {fold}")
        name = row["filename"] if row["filename"] in there else bare.get(row["filename"], "")
        if not name:
            missing.append((where, f"no file {row['filename']} below {text_of(root / videos)}"))
            continue
        sources.append(
            Source(
                key=key_of(row["filename"].rsplit(".", 1)[0]),
                path=str(root / videos / there[name]),
                label=target,
                split=f"fold{fold}",
                extra={"src_file": recording, "esc10": row.get("esc10", "") == "True"},
            )
        )
    if not sources:
        raise CorpusError(f"{text_of(root / videos)}: none of {len(rows) - 1} recordings is there; name their folder")
    classes = tuple(names.get(number, str(number)) for number in range(max(names) + 1))
    ordered = sorted(sources, key=lambda source: source.key.encode())
    return Corpus(sources=tuple(ordered), classes=classes, missing=tuple(missing))


def parse_name(name: str) -> tuple[int, int]:
    """(fold, target) from a file name, with or without a category in front.

    >>> parse_name("1-100032-A-0.wav"), parse_name("dog-1-100032-A-0.wav")
    ((1, 0), (1, 0))
    """
    match = _NAME.fullmatch(name.rsplit(".", 1)[0])
    if match is None:
        raise CorpusError(f"{name!r} is not <fold>-<recording>-<take>-<target>; rename it or use the list")
    return int(match["fold"]), int(match["target"])


def _bare(name: str) -> str:
    """The file name without a category in front."""
    match = _NAME.fullmatch(name.rsplit(".", 1)[0])
    return name if match is None else name[match.start("fold") :]
