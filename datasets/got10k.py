"""GOT-10k (Huang, Zhao, Huang, TPAMI 2021): many short tracking sequences, used to train tracking heads.

Layout: ``train/list.txt`` (a name per row) and ``train/GOT-10k_Train_000001/`` with ``00000001.jpg`` ...,
``groundtruth.txt`` (rows x,y,width,height in pixels, the corner counted from 1) and ``cover.label`` (a row per frame,
0 to 8: how much of the target can be seen).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmill.datasets import otb
from clipmill.datasets.davis import files
from clipmill.datasets.files import IMAGE_SUFFIXES, read_lines, text_of
from clipmill.datasets.source import CorpusError

LIST, BOXES, COVER = "list.txt", "groundtruth.txt", "cover.label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One training sequence. frames: T images. boxes: (T, 4) float64. cover: (T,) int64 or None if not annotated."""

    name: str
    frames: tuple[Path, ...]
    boxes: np.ndarray
    cover: np.ndarray | None


def read(root: Path, split: str = "train") -> list[Track]:
    """The sequences of ``root/split``, or of ``root`` itself, in the order of the list; OTB folders will do too.

    Raises CorpusError for anything that is missing or does not fit together; nothing is decoded.
    """
    base = root / split if (root / split).is_dir() else root
    if not base.is_dir():
        raise CorpusError(f"{text_of(base)}: no such folder; give the folder that holds the GOT-10k sequences")
    if (base / LIST).is_file():
        names = [row.strip() for _, row in read_lines(base / LIST)]
    else:
        names = sorted(path.parent.name for path in base.glob(f"*/{BOXES}"))
    if names:
        return [_track(base / name) for name in names]
    if next(base.glob("*/groundtruth_rect*.txt"), None) is None:
        raise CorpusError(f"{text_of(base)}: neither {LIST} nor a SEQUENCE/{BOXES} there; unpack the corpus again")
    return [
        Track(name=video.name, frames=video.frames, boxes=video.boxes, cover=None)
        for video in otb.read(base, suite="folder")
    ]


def _track(folder: Path) -> Track:
    frames = files(folder, tuple(IMAGE_SUFFIXES))
    boxes = otb.read_boxes(folder / BOXES)
    cover = None
    if (folder / COVER).is_file():
        try:
            cover = np.array([int(row) for _, row in read_lines(folder / COVER)], np.int64)
        except ValueError as error:
            raise CorpusError(f"{text_of(folder / COVER)}: {error}; write a number from 0 to 8 per frame") from error
    for name, rows in ((BOXES, boxes), (COVER, cover)):
        if rows is not None and len(rows) != len(frames):
            raise CorpusError(
                f"{text_of(folder / name)}: {len(rows)} rows for {len(frames)} images; unpack the sequence again"
            )
    return Track(name=folder.name, frames=tuple(frames), boxes=boxes, cover=cover)
