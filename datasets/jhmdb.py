"""JHMDB (Jhuang et al., "Towards Understanding Action Recognition", ICCV 2013): clips with 15 annotated joints.

Layout: ``Rename_Images/CLASS/CLIP/00001.png``, ``joint_positions/CLASS/CLIP/joint_positions.mat`` (MATLAB 5, array
``pos_img`` (2, 15, T) of x and y in pixels counted from 1) and ``splits/CLASS_test_split1.txt`` (rows ``CLIP.avi 1|2``,
2 = test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmill.datasets.davis import files
from clipmill.datasets.files import read_lines, text_of
from clipmill.datasets.source import CorpusError

JOINTS = (
    "neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow", "left elbow",
    "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle",
)  # fmt: skip
BONES = (
    (2, 0), (12, 8), (8, 4), (4, 0), (11, 7), (7, 3), (3, 0), (0, 1), (14, 10), (10, 6), (6, 1), (13, 9), (9, 5),
    (5, 1),
)  # fmt: skip
_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedVideo:
    """One clip: its frames in order, and the file of its joints."""

    name: str
    frames: tuple[Path, ...]
    joints: Path


def read(root: Path, *, split: int = 1, clips: Sequence[str] = ()) -> list[PosedVideo]:
    """The test clips of a split, by class and name; all clips where the corpus has no split lists.

    clips: these (``CLASS/CLIP``) instead. Raises CorpusError for anything that is missing; nothing is decoded.
    """
    joints = root / "joint_positions"
    if not joints.is_dir():
        raise CorpusError(f"{text_of(joints)}: no such folder; give the folder that holds it as the JHMDB corpus")
    names = list(clips) or _test_clips(root / "splits", split)
    if not names:
        names = sorted(
            f"{path.parent.parent.name}/{path.parent.name}" for path in joints.glob("*/*/joint_positions.mat")
        )
    if not names:
        raise CorpusError(f"{text_of(joints)}: no CLASS/CLIP/joint_positions.mat below; unpack the corpus again")
    return [
        PosedVideo(
            name=name,
            frames=tuple(files(root / "Rename_Images" / name, _PICTURES)),
            joints=joints / name / "joint_positions.mat",
        )
        for name in names
    ]


def _test_clips(folder: Path, split: int) -> list[str]:
    suffix = f"_test_split{split}.txt"
    names = []
    for path in sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else ():
        for number, row in read_lines(path):
            clip, _, part = row.strip().rpartition(" ")
            if part not in ("0", "1", "2") or not clip:
                raise CorpusError(f"{text_of(path)} row {number}: {row!r} is not `CLIP.avi 1|2`; write it so")
            if part == "2":
                names.append(f"{path.name.removesuffix(suffix)}/{clip.removesuffix('.avi')}")
    return names


def joint_positions(path: Path) -> np.ndarray:
    """(2, 15, T) float64: x and y of every joint in pixels, counted from 1 as in the file."""
    from scipy.io import loadmat

    try:
        with path.open("rb") as file:
            positions = np.asarray(loadmat(file, variable_names=["pos_img"])["pos_img"], np.float64)
    except FileNotFoundError as error:
        raise CorpusError(f"{text_of(path)}: no such file; take the clip off the list or unpack it") from error
    except Exception as error:  # whatever a broken file makes the reader stumble over
        raise CorpusError(f"{text_of(path)}: no MATLAB 5 file with pos_img ({error}); unpack it again") from error
    if positions.ndim != 3 or positions.shape[:2] != (2, len(JOINTS)) or not positions.shape[2]:
        raise CorpusError(f"{text_of(path)}: pos_img has shape {positions.shape}, not (2, 15, frames); unpack it again")
    if not np.isfinite(positions).all():
        raise CorpusError(f"{text_of(path)}: pos_img has numbers that are not finite; take the clip off the list")
    return positions
