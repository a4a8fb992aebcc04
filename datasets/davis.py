"""DAVIS 2016 and 2017 (Perazzi et al., CVPR 2016; Pont-Tuset et al., arXiv 1704.00675): frames and object masks.

Layout: ``JPEGImages/480p/SEQUENCE/00000.jpg``, ``Annotations/480p/SEQUENCE/00000.png`` and one list per split,
``ImageSets/2017/val.txt`` (a name per row) or the ``ImageSets/480p/val.txt`` of 2016 (a frame and its mask per row).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from clipmill.datasets.files import read_lines, suffix_of, text_of
from clipmill.datasets.source import CorpusError

Year = Literal["2016", "2017"]
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedVideo:
    """One sequence.

    frames: pictures in order; empty if only masks were asked for. masks: annotations in order, one per frame, or that
    of the first frame only (test splits).
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


def read(
    root: Path,
    *,
    year: Year = "2017",
    split: str = "val",
    sequences: Sequence[str] = (),
    resolution: str = "480p",
    pictures: bool = True,
) -> list[MaskedVideo]:
    """The sequences of a split, in the order of its list.

    sequences: these instead of the list's. Where the corpus has no lists, all sequences with masks are taken (and
    with frames, if ``pictures``). pictures: whether frames are needed. Raises CorpusError for anything that is missing
    or does not fit together; nothing is decoded.
    """
    frames, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    if year == "2016" and (root / "Annotations_2016" / resolution).is_dir():
        masks = root / "Annotations_2016" / resolution
    for folder in (frames, masks) if pictures else (masks,):
        if not folder.is_dir():
            raise CorpusError(f"{text_of(folder)}: no such folder; give the folder that holds it as the DAVIS corpus")
    names = list(sequences) or _listed(root, year, split)
    if not names:
        names = [name for name in _folders(masks) if not pictures or (frames / name).is_dir()]
    if not names:
        raise CorpusError(f"{text_of(masks)}: no sequences there; unpack the corpus again")
    return [_video(name, frames / name if pictures else None, masks / name) for name in names]


def label_map(path: Path, year: Year = "2017") -> np.ndarray:
    """A mask file as (H, W) uint8 object ids. Of 2016, everything but 0 is object 1; of 2017, 255 stays (void)."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise CorpusError(
                    f"{text_of(path)}: a picture of mode {image.mode}, its colours are no object ids; "
                    "write masks as palette PNG"
                )
            ids = np.array(image, np.uint8)
    except CorpusError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        what = "no such mask" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise CorpusError(f"{text_of(path)}: {what}; every scored frame needs one") from error
    return (ids > 0).astype(np.uint8) if year == "2016" else ids


def _listed(root: Path, year: str, split: str) -> list[str]:
    """Names in the list of a split, each once; none if the corpus has no lists at all."""
    folders = [root / "ImageSets" / year, *([root / "ImageSets" / "480p"] if year == "2016" else [])]
    for folder in folders:
        path = folder / f"{split}.txt"
        if path.is_file():
            rows = [row.split()[0] for _, row in read_lines(path)]
            return list(dict.fromkeys(row.split("/")[-2] if "/" in row else row for row in rows))
    known = sorted(path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.txt"))
    if known:
        raise CorpusError(f"{text_of(folders[0])}: no list {split}.txt; it has {', '.join(known)}")
    return []


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _video(name: str, frames: Path | None, masks: Path) -> MaskedVideo:
    labels = files(masks, (".png",))
    _without_gap(labels)
    if frames is None:
        return MaskedVideo(name=name, frames=(), masks=tuple(labels))
    pictures = files(frames, _PICTURES)
    _without_gap(pictures)
    shown, labelled = [path.stem for path in pictures], [path.stem for path in labels]
    if shown[0] != labelled[0]:
        raise CorpusError(f"{text_of(masks)}: no mask of the first frame {shown[0]}; it is what is propagated")
    if len(labels) > 1 and (alone := sorted(set(shown) ^ set(labelled))):
        lacks = f"mask of frame {alone[0]}" if alone[0] in shown else f"frame of mask {alone[0]}"
        raise CorpusError(f"{text_of(masks)}: there is no {lacks} ({name}); unpack the sequence again")
    return MaskedVideo(name=name, frames=tuple(pictures), masks=tuple(labels))


def files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder with one of the suffixes, in the order of their names; hidden ones are left out."""
    if not folder.is_dir():
        raise CorpusError(f"{text_of(folder)}: no such folder; take the sequence off the list or unpack it")
    names = [entry.name for entry in os.scandir(folder) if suffix_of(entry.name) in suffixes]
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise CorpusError(f"{text_of(folder)}: no {' or '.join(suffixes)} files there; unpack the sequence again")
    return [folder / name for name in names]


def _without_gap(paths: Sequence[Path]) -> None:
    """Raise CorpusError where numbered files leave out a number: a missing frame would shift all that follow."""
    if not all(path.stem.isdecimal() for path in paths):
        return
    numbers = [int(path.stem) for path in paths]
    for number, wanted in zip(numbers, range(numbers[0], numbers[0] + len(numbers)), strict=True):
        if number != wanted:
            raise CorpusError(f"{text_of(paths[0].parent)}: frame {wanted:05d} is missing; unpack the sequence again")
