"""VIP (Zhou et al., "Adaptive Temporal Encoding Network for Video Instance-level Human Parsing", ACM MM 2018).

Layout: ``Images/VIDEO/000000000001.jpg``, ``Annotations/Category_ids/VIDEO/000000000001.png`` (grey values are part
ids 0 to 19, 255 = ignore) and ``lists/val_videos.txt`` (one folder per row, its last part is the name). Only annotated
frames count; together they are treated as the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipmill.datasets.davis import MaskedVideo, files
from clipmill.datasets.files import read_lines, text_of
from clipmill.datasets.source import CorpusError

CLASSES = (
    "background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants", "gloves", "scarf",
    "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg", "right-shoe", "left-shoe",
)  # fmt: skip
_PICTURES = (".jpg", ".jpeg", ".png")


def read(root: Path, *, split: str = "val", videos: Sequence[str] = ()) -> list[MaskedVideo]:
    """The videos of a split, in the order of its list; all annotated ones where there is no list.

    videos: these instead. Frames without annotation are left out. Raises CorpusError for anything that is missing;
    nothing is decoded.
    """
    masks = root / "Annotations" / "Category_ids"
    if not masks.is_dir():
        raise CorpusError(f"{text_of(masks)}: no such folder; give the folder that holds it as the VIP corpus")
    names = list(videos)
    table = root / "lists" / f"{split}_videos.txt"
    if not names and table.is_file():
        names = [row.strip().rstrip("/").split("/")[-1] for _, row in read_lines(table)]
    if not names:
        names = sorted(path.name for path in masks.iterdir() if path.is_dir())
    if not names:
        raise CorpusError(f"{text_of(masks)}: no videos there; unpack the corpus again")
    return [_video(name, root / "Images" / name, masks / name) for name in names]


def _video(name: str, frames: Path, masks: Path) -> MaskedVideo:
    labels = files(masks, (".png",))
    pictures = {path.stem: path for path in files(frames, _PICTURES)}
    missing = next((path for path in labels if path.stem not in pictures), None)
    if missing is not None:
        raise CorpusError(f"{text_of(frames)}: no frame of mask {missing.stem}; unpack the video again")
    return MaskedVideo(name=name, frames=tuple(pictures[path.stem] for path in labels), masks=tuple(labels))
