"""OTB (Wu, Lim, Yang, CVPR 2013 and TPAMI 2015): tracking sequences with a box per frame.

Layout: ``SEQUENCE/img/0001.jpg`` and ``SEQUENCE/groundtruth_rect.txt``, or ``groundtruth_rect.1.txt`` and ``.2.txt``
where two targets share the images. A row is x, y, width, height in pixels, separated by commas, tabs or blanks; the
upper left pixel of an image is (1, 1). Lists of all boxes as JSON (``OTB2015.json.gz``, ``OTB100.json``,
``CVPR13.json``: sequence name -> ``gt_rect``) are enough where no images are needed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clipmill.datasets.davis import files
from clipmill.datasets.files import IMAGE_SUFFIXES, read_lines, text_of
from clipmill.datasets.otb_sequences import ENTRIES, FRAMES, ONLY_SECOND, SHARED, canonical, spelling
from clipmill.datasets.source import CorpusError

Suite = Literal["otb2013", "otb50", "otb100", "folder"]
BOXES = "groundtruth_rect.txt"
_JSON = re.compile(r"(otb|cvpr13|tb[-_]?\d).*\.json(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxedVideo:
    """One target in one video.

    frames: T images in order; empty if only boxes were asked for. boxes: (T, 4) float64 x, y, width, height, the
    corner counted from 1; rows may be invalid (zero size, NaN). attributes: keys of
    `clipmill.datasets.otb_sequences.ATTRIBUTES`. before: (n, 4) boxes of images before the first one that counts.
    """

    name: str
    frames: tuple[Path, ...]
    boxes: np.ndarray
    attributes: tuple[str, ...]
    before: np.ndarray


def suite_names(suite: Suite) -> list[str]:
    """Names of the sequences of a set, in alphabetic order; none for ``folder``.

    >>> [len(suite_names(suite)) for suite in ("otb2013", "otb50", "otb100")]
    [51, 50, 100]
    """
    if suite == "folder":
        return []
    rows = ENTRIES.values()
    return [row.name for row in rows if suite == "otb100" or (row.in_2013 if suite == "otb2013" else row.in_50)]


def read(
    root: Path, *, suite: Suite = "otb100", sequences: Sequence[str] = (), pictures: bool = True
) -> list[BoxedVideo]:
    """The sequences of a set, or those named, or (``folder``) all that lie in the folder.

    root: the folder with the sequence folders; without pictures also a JSON list of boxes, or the folder it lies in.
    sequences: names in any toolkit's spelling (``Jogging-1``, ``Jogging.1``, ``jogging_1``). Raises CorpusError for
    anything that is missing or does not fit together; nothing is decoded.
    """
    lists = {} if pictures else _lists(root)
    if not root.is_dir() and not lists:
        raise CorpusError(f"{text_of(root)}: no such folder; give the folder that holds the OTB sequences")
    names = [canonical(name) for name in sequences] or suite_names(suite) or _found(root, lists)
    if not names:
        raise CorpusError(f"{text_of(root)}: no sequence there; each needs img/ and {BOXES}")
    folders = {name: _folder(root, name) for name in names}
    missing = [name for name, folder in folders.items() if folder is None and spelling(name) not in lists]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CorpusError(
            f"{text_of(root)}: {len(missing)} of {len(names)} sequences are missing ({some}); unpack them, "
            "or take what there is with --suite folder"
        )
    return [
        _video(name, folder, pictures) if folder else _listed(name, *lists[spelling(name)])
        for name, folder in folders.items()
    ]


def read_boxes(path: Path) -> np.ndarray:
    """(T, 4) boxes of a text file: four numbers a row, separated by commas, tabs, semicolons or blanks; NaN allowed."""
    rows = []
    for number, text in read_lines(path):
        fields = re.split(r"[,;\s]+", text.strip().strip(",;"))
        try:
            row = [float(field) for field in fields]
        except ValueError:
            row = []
        if len(row) != 4:
            raise CorpusError(
                f"{text_of(path)} row {number}: {text.strip()[:60]!r} is not four numbers; write x,y,width,height"
            )
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, 4)


# --- one sequence -------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str]:
    """(folder, number of the target) of a sequence; the number is empty where a folder has one target."""
    folder = {**SHARED, **ONLY_SECOND}.get(name)
    if folder is not None:
        return folder, name.rpartition("-")[2]
    stem, dash, number = name.rpartition("-")
    return (stem, number) if dash and number.isdecimal() and name not in ENTRIES else (name, "")


def _folder(root: Path, name: str) -> Path | None:
    """The folder of a sequence in any spelling; a shared folder may also exist once per target."""
    base = _split(name)[0]
    known = {spelling(path.name): path for path in sorted(root.iterdir()) if path.is_dir()} if root.is_dir() else {}
    return next((known[key] for key in (spelling(name), spelling(base)) if key in known), None)


def _box_file(folder: Path, name: str) -> Path:
    """The file of a target's boxes; without a number of its own, a single file with one will do."""
    number = _split(name)[1]
    own = folder / f"groundtruth_rect.{number}.txt"
    if number and own.is_file():
        return own
    plain = folder / BOXES
    if not plain.is_file():
        raise CorpusError(f"{text_of(own if number else plain)}: no such file; every target needs its boxes")
    return plain


def _video(name: str, folder: Path, pictures: bool) -> BoxedVideo:
    path = _box_file(folder, name)
    boxes = read_boxes(path)
    if not len(boxes):
        raise CorpusError(f"{text_of(path)}: no boxes in it; unpack the sequence again")
    if pictures or (folder / "img").is_dir():
        images = _numbered(folder / "img")
        frames, before = _counting(name, folder / "img", images, path, len(boxes))
    else:
        first, last = FRAMES.get(name, (1, 0))
        frames, before = (), first - 1 if len(boxes) == last else 0
    return BoxedVideo(
        name=name,
        frames=frames if pictures else (),
        boxes=boxes[before : before + len(frames)] if frames else boxes[before:],
        attributes=_attributes(name, folder / "attrs.txt"),
        before=boxes[:before],
    )


def _counting(name: str, folder: Path, images: dict[int, Path], boxes: Path, rows: int) -> tuple[tuple[Path, ...], int]:
    """The images that count, and how many of the file's boxes belong to images before them."""
    numbers = list(images)
    for number, wanted in zip(numbers, range(numbers[0], numbers[0] + len(numbers)), strict=True):
        if number != wanted:
            raise CorpusError(f"{text_of(folder)}: image {wanted} is missing; unpack the sequence again")
    first, last = FRAMES.get(name, (numbers[0], numbers[-1]))
    if numbers[0] > first or numbers[-1] < last:
        raise CorpusError(f"{text_of(folder)}: {name} is images {first} to {last}, not all of them are there")
    used, early = last - first + 1, first - numbers[0]
    if rows not in (used, early + used, len(numbers)):
        raise CorpusError(
            f"{text_of(boxes)}: {rows} boxes for {used} images ({first} to {last}); every image needs one"
        )
    return tuple(images[number] for number in range(first, last + 1)), 0 if rows == used else early


def _numbered(folder: Path) -> dict[int, Path]:
    """{number: path} of the images of a folder, in order."""
    paths = files(folder, tuple(IMAGE_SUFFIXES))
    odd = next((path for path in paths if not path.stem.isdecimal()), None)
    if odd is not None:
        raise CorpusError(f"{text_of(odd)}: its name is no image number; take it out of the folder")
    return dict(sorted((int(path.stem), path) for path in paths))


def _listed(name: str, path: Path, boxes: np.ndarray) -> BoxedVideo:
    """A sequence of a JSON list."""
    if not len(boxes):
        raise CorpusError(f"{text_of(path)}: no boxes of {name}; take it out of the list")
    return BoxedVideo(name=name, frames=(), boxes=boxes, attributes=_attributes(name, None), before=boxes[:0])


def _attributes(name: str, path: Path | None) -> tuple[str, ...]:
    """Those of the benchmark; of other sequences, those in a file."""
    if name in ENTRIES:
        return ENTRIES[name].attributes
    if path is None or not path.is_file():
        return ()
    return tuple(word for _, row in read_lines(path) for word in re.split(r"[,\s]+", row.strip()) if word)


# --- what there is ------------------------------------------------------------------------------------------


def _found(root: Path, lists: Iterable[str]) -> list[str]:
    """Sequences of a folder: one per file of boxes beside an image folder, then those of JSON lists."""
    names = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        targets = sorted(folder.glob("groundtruth_rect*.txt"))
        numbers = [match[1] for path in targets if (match := re.fullmatch(r"groundtruth_rect\.(\d+)\.txt", path.name))]
        if not (folder / "img").is_dir():
            continue
        if not numbers:
            names += [canonical(folder.name)] if targets else []
        elif re.search(r"[-.]\d+$", folder.name):  # a copy of the folder for each target
            names.append(canonical(folder.name))
        else:
            used = [n for n in numbers if (folder / f"groundtruth_rect.{n}.txt").stat().st_size]
            names += [canonical(f"{folder.name}-{n}") for n in used]
    have = {spelling(name) for name in names}
    return names + [canonical(name) for name in lists if name not in have]


def _lists(root: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """{spelling of the name: (file, boxes)} of the JSON lists of a folder, or of the one that ``root`` is."""
    paths = [root] if root.is_file() else sorted(root.iterdir()) if root.is_dir() else []
    found: dict[str, tuple[Path, np.ndarray]] = {}
    for path in paths:
        if path.is_file() and (path == root or _JSON.match(path.name)):
            for name, boxes in _json_boxes(path).items():
                found.setdefault(spelling(canonical(name)), (path, boxes))
    return found


def _json_boxes(path: Path) -> dict[str, np.ndarray]:
    try:
        raw = path.read_bytes()
        content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        if not isinstance(content, Mapping):
            raise TypeError("not a mapping of sequences")
        return {name: np.array(item["gt_rect"], np.float64).reshape(-1, 4) for name, item in content.items()}
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise CorpusError(f"{text_of(path)}: no list of boxes ({error!r}); write NAME -> gt_rect as JSON") from error
