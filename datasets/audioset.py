"""AudioSet: segment lists with several labels per segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipmill.datasets.files import (
    MEDIA_SUFFIXES,
    best_match,
    by_stem,
    class_number,
    find,
    key_of,
    lists_in,
    read_csv,
    text_of,
)
from clipmill.datasets.source import Corpus, CorpusError, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One segment. where: list and row number, for messages. mids: label ids such as ``/m/09x0r``."""

    where: str
    ytid: str
    start_s: float
    end_s: float
    mids: tuple[str, ...]
    split: str


def read(
    root: Path,
    *,
    lists: str = "*segments*.csv",
    videos: str = "",
    class_list: str = "class_labels_indices.csv",
    trimmed: bool = True,
) -> Corpus:
    """Segments of AudioSet: the rows of its lists whose files are there.

    lists: CSV files ``YTID, start_seconds, end_seconds, "mid,mid"`` with ``#`` header rows; a path or pattern below
    ``root``. The split is the list's name without ``_segments``. videos: folder with the files below ``root``; they
    may lie in sub-folders, with any suffix, named ``<id>``, or ``<id>_<start>`` and ``<id>_<start>_<end>`` in seconds
    or milliseconds, all with or without a leading ``Y``. class_list: CSV ``index,mid,display_name`` below ``root``;
    if it is not there the classes are the mids, in order. trimmed: a file named ``<id>`` alone is the segment; if
    False it is the whole video, and start and end are set.

    All labels are in ``labels``, in the order of the row; ``label`` is set where there is only one. Key:
    ``<id>_<start in ms>``. Rows without a file, and repeated ones, are in ``missing``. Raises CorpusError for a
    missing or malformed list, an unknown label, and if no row has a file.
    """
    root = Path(root)
    rows = [row for path in lists_in(root, lists) for row in parse(path)]
    mids = {mid: number for number, mid in enumerate(sorted({mid for row in rows for mid in row.mids}))}
    classes = tuple(mids)
    if (root / class_list).is_file():
        mids, classes = parse_classes(root / class_list)
    files = by_stem(find(root / videos, MEDIA_SUFFIXES))
    sources: dict[str, Source] = {}
    missing: list[tuple[str, str]] = []
    user: dict[str, Row] = {}  # who uses a file that is named by its id alone
    for row in rows:
        labels = tuple(class_number(mid, mids, row.where) for mid in row.mids)
        key = key_of(f"{row.ytid}_{round(1000 * row.start_s)}")
        stem = next((stem for stem in _stems(row) if stem in files), None)
        if key in sources:
            missing.append((row.where, f"the segment {key} is listed twice"))
        elif stem is None:
            missing.append((row.where, f"no file {row.ytid}* below {text_of(root / videos)}"))
        else:
            alone = stem in (row.ytid, f"Y{row.ytid}")
            if alone and trimmed and user.setdefault(stem, row) is not row:
                raise CorpusError(
                    f"{row.where}: the file {stem}.* is also the segment of {user[stem].where}; "
                    "if it is the whole video, read with trimmed=False"
                )
            whole = alone and not trimmed
            sources[key] = Source(
                key=key,
                path=str(root / videos / best_match(files[stem], (row.split,))),
                label=labels[0] if len(labels) == 1 else -1,
                labels=labels,
                split=row.split,
                start_s=row.start_s if whole else None,
                end_s=row.end_s if whole else None,
            )
    if not sources:
        raise CorpusError(
            f"{text_of(root / videos)}: none of the {len(rows)} segments is there; name the files' folder"
        )
    ordered = sorted(sources.values(), key=lambda source: source.key.encode())
    return Corpus(sources=tuple(ordered), classes=classes, missing=tuple(missing))


def parse(path: Path) -> list[Row]:
    """The rows of one segment list; CorpusError names the row that cannot be read."""
    split = path.stem.replace("_segments", "")
    rows = []
    for number, fields in read_csv(path):
        where = f"{text_of(path)} row {number}"
        try:
            ytid, start, end, labels = fields
            start_s, end_s = float(start), float(end)
        except ValueError:
            raise CorpusError(
                f'{where}: {", ".join(fields)!r} is not YTID, start, end, "mid,mid"; correct it'
            ) from None
        mids = tuple(mid.strip() for mid in labels.split(",") if mid.strip())
        if not ytid or not mids or not 0 <= start_s < end_s < 1e6:
            raise CorpusError(f"{where}: needs an id, seconds 0 <= start < end, and at least one label; correct it")
        rows.append(Row(where=where, ytid=ytid, start_s=start_s, end_s=end_s, mids=mids, split=split))
    return rows


def parse_classes(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """(label number by mid, names by label number) of a ``class_labels_indices.csv``."""
    rows = read_csv(path)
    if rows and not rows[0][1][0].isdigit():
        rows = rows[1:]  # the header
    mids: dict[str, int] = {}
    names: list[str] = []
    for number, fields in rows:
        if len(fields) != 3 or fields[0] != str(len(names)) or fields[1] in mids:
            raise CorpusError(
                f"{text_of(path)} row {number}: {','.join(fields)!r}; need index,mid,display_name, counted from 0"
            )
        mids[fields[1]] = len(names)
        names.append(fields[2])
    return mids, tuple(names)


def _stems(row: Row) -> Iterator[str]:
    """The file names under which a segment is known, without suffix."""
    start_s, end_s = row.start_s, row.end_s
    pairs = [(f"{round(1000 * start_s)}", f"{round(1000 * end_s)}"), (f"{start_s:g}", f"{end_s:g}")]
    pairs += [(f"{start_s:.{digits}f}", f"{end_s:.{digits}f}") for digits in (1, 3)]
    pairs.append((f"{round(start_s):06d}", f"{round(end_s):06d}"))
    for ytid in (row.ytid, f"Y{row.ytid}"):
        for start, end in pairs:
            yield f"{ytid}_{start}_{end}"
        for start, _ in pairs:
            yield f"{ytid}_{start}"
    yield from (row.ytid, f"Y{row.ytid}")
