"""Kinetics-400/600/700: CSV lists and clips named by YouTube id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmill.datasets.files import (
    MEDIA_SUFFIXES,
    SPLITS,
    best_match,
    by_stem,
    class_number,
    find,
    key_of,
    lists_in,
    read_classes,
    read_csv,
    text_of,
)
from clipmill.datasets.source import Corpus, CorpusError, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a list. where: list and row number, for messages. label: empty if the list has none."""

    where: str
    youtube_id: str
    start_s: float
    end_s: float
    label: str
    split: str

    @property
    def key(self) -> str:
        """``<id>_<start>_<end>``, six digits of seconds each."""
        return f"{self.youtube_id}_{round(self.start_s):06d}_{round(self.end_s):06d}"


def read(root: Path, *, lists: str = "*.csv", videos: str = "", class_list: str = "", trimmed: bool = True) -> Corpus:
    """Clips of a Kinetics corpus: the rows of its lists whose files are there.

    lists: CSV files with the columns youtube_id, time_start, time_end and, as far as they go, label and split; a path
    or pattern below ``root``. videos: folder with the clips below ``root``; they may lie in it or in sub-folders by
    split and class, named ``<id>_<start>_<end>`` (seconds, with or without six digits) or ``<id>``, with any suffix.
    class_list: text file with one class per row that fixes the labels; default: the classes of all lists,
    alphabetically. trimmed: a file named ``<id>`` alone is the clip; if False it is the whole video, and start and
    end are set.

    Key: ``<id>_<start>_<end>``. Rows without a file, and repeated ones, are in ``missing``. Raises CorpusError for a
    missing or malformed list, and if no row has a file.
    """
    root = Path(root)
    rows = [row for path in lists_in(root, lists) for row in parse(path)]
    classes = read_classes(root / class_list) if class_list else tuple(sorted({row.label for row in rows} - {""}))
    return match(rows, root / videos, classes, trimmed)


def parse(path: Path) -> list[Row]:
    """The rows of one list, as written; CorpusError names the row that cannot be read."""
    rows = read_csv(path)
    name = text_of(path)
    columns = {column.lower(): place for place, column in enumerate(rows[0][1])} if rows else {}
    absent = [column for column in ("youtube_id", "time_start", "time_end") if column not in columns]
    if absent:
        raise CorpusError(f"{name}: no column {', '.join(absent)}; the first row must name the columns")
    parsed = []
    for number, fields in rows[1:]:
        where = f"{name} row {number}"
        if len(fields) != len(columns):
            raise CorpusError(f"{where}: {len(fields)} fields instead of {len(columns)}; correct or remove the row")
        row = {column: fields[place] for column, place in columns.items()}
        try:
            start_s, end_s = float(row["time_start"]), float(row["time_end"])
        except ValueError:
            start_s = end_s = -1.0
        if not row["youtube_id"] or not 0 <= start_s < end_s < 1e6:
            times = f"{row['time_start']!r} to {row['time_end']!r}"
            raise CorpusError(
                f"{where}: id {row['youtube_id']!r}, time {times}; need an id and seconds 0 <= start < end"
            )
        split = row.get("split", "")
        parsed.append(
            Row(
                where=where,
                youtube_id=row["youtube_id"],
                start_s=start_s,
                end_s=end_s,
                label=row.get("label", ""),
                split=SPLITS.get(split.lower(), split),
            )
        )
    return parsed


def match(rows: Sequence[Row], videos: Path, classes: Sequence[str], trimmed: bool = True) -> Corpus:
    """Find the file of every row below the folder ``videos``; options and errors as in `read`."""
    files = by_stem(find(videos, MEDIA_SUFFIXES))
    label_of = {name: number for number, name in enumerate(classes)}
    sources: dict[str, Source] = {}
    missing: list[tuple[str, str]] = []
    user: dict[str, Row] = {}  # who uses a file that is named by its id alone
    first: dict[str, str] = {}
    for row in rows:
        label = class_number(row.label, label_of, row.where) if row.label else -1
        named = (row.key, f"{row.youtube_id}_{row.start_s:g}_{row.end_s:g}")
        stem = next((stem for stem in (*named, row.youtube_id) if stem in files), None)
        key = key_of(row.key)
        if key in sources:
            missing.append((row.where, f"the same clip as {first[key]}"))
            continue
        if stem is None:
            missing.append((row.where, f"no file {row.key}.* or {row.youtube_id}.* below {text_of(videos)}"))
            continue
        whole = stem == row.youtube_id and not trimmed
        if stem not in named and not whole and user.setdefault(stem, row) is not row:
            raise CorpusError(
                f"{row.where}: the file {stem}.* is also the clip of {user[stem].where}; "
                "if it is the whole video, read with trimmed=False"
            )
        first[key] = row.where
        sources[key] = Source(
            key=key,
            path=str(videos / best_match(files[stem], (row.label, row.split))),
            label=label,
            split=row.split,
            start_s=row.start_s if whole else None,
            end_s=row.end_s if whole else None,
        )
    if not sources:
        raise CorpusError(f"{text_of(videos)}: none of the {len(rows)} listed clips is there; name the videos' folder")
    ordered = sorted(sources.values(), key=lambda source: source.key.encode())
    return Corpus(sources=tuple(ordered), classes=tuple(classes), missing=tuple(missing))
