"""Boxes of trackers on disk: written as text for any toolkit, read from anybody's text or JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.datasets.otb import BoxedVideo, read_boxes
from clipmill.datasets.otb_sequences import FRAMES, canonical, spelling
from clipmill.tools.evaluate.evaluator import write_atomic
from clipmill.tools.tracker import Tracked

BOXES, TIMES = "boxes", "times"
DECIMALS = 3
_TIME = "_time"
_SHIFTED = "Tiger1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What is compared: boxes (n, 4) of the truth and of the tracker, frame by frame."""

    video: BoxedVideo
    truth: np.ndarray
    found: np.ndarray


def write_result(out: Path, name: str, tracked: Tracked) -> list[str]:
    """Write ``boxes/NAME.txt`` (x,y,width,height) and ``boxes/times/NAME_time.txt`` (seconds); returns their names."""
    rows = "".join(",".join(f"{number:.{DECIMALS}f}" for number in box) + "\n" for box in tracked.boxes.tolist())
    seconds = "".join(f"{number:.6f}\n" for number in tracked.seconds.tolist())
    names = [f"{BOXES}/{name}.txt", f"{BOXES}/{TIMES}/{name}{_TIME}.txt"]
    for file, text in zip(names, (rows, seconds), strict=True):
        write_atomic(out / file, text.encode())
    return names


def read_results(folder: Path, videos: Sequence[BoxedVideo], published_tiger1: bool = False) -> list[Scored]:
    """The results of a folder, paired with the truth.

    ``SEQUENCE.txt`` has a box per frame. ``SEQUENCE.json`` is the OTB benchmark's: ``res`` with the boxes of frames
    ``startFrame`` to ``endFrame``, counted from 1 within the sequence; where it ends early, as STRUCK's ClifBar does,
    only those frames are scored, as in the published scores. published_tiger1: see `_shifted`. Raises ValueError for
    anything that is missing or does not fit.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder with a tracker's SEQUENCE.txt or SEQUENCE.json")
    files = _files(folder)
    missing = [video.name for video in videos if spelling(video.name) not in files]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{folder}: no results of {len(missing)} of {len(videos)} sequences ({some}); "
            "add them, or name the sequences to score with --sequences"
        )
    return [_paired(video, files[spelling(video.name)], published_tiger1) for video in videos]


def _files(folder: Path) -> dict[str, Path]:
    """{spelling of the sequence: file}; text wins over JSON."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".txt", ".json") or path.stem.endswith(_TIME) or path.name == "score.json":
            continue
        key = spelling(canonical(path.stem))
        if key in found and found[key].suffix == path.suffix:
            raise ValueError(f"{path}: the same sequence as {found[key].name}; keep one of them")
        if key not in found or path.suffix.lower() == ".txt":
            found[key] = path
    return found


def _paired(video: BoxedVideo, path: Path, published_tiger1: bool) -> Scored:
    total, early = len(video.boxes), max(FRAMES.get(video.name, (1, 0))[0], 1) - 1
    if path.suffix.lower() == ".json":
        found, start = _read_json(path)
    else:
        found, start = read_boxes(path), 1
        if len(found) == total + early:  # of the images before the first that counts, too
            found = found[early:]
        if len(found) != total:
            raise ValueError(f"{path}: {len(found)} boxes, but {video.name} has {total} frames; run the tracker again")
    if published_tiger1 and video.name == _SHIFTED:
        return _shifted(video, found, early)
    truth = video.boxes[start - 1 : start - 1 + len(found)]
    if len(truth) != len(found) or start < 1:
        raise ValueError(
            f"{path}: frames {start} to {start + len(found) - 1}, but {video.name} has frames 1 to {total}; "
            "correct startFrame"
        )
    return Scored(video=video, truth=truth, found=found)


def _shifted(video: BoxedVideo, found: np.ndarray, early: int) -> Scored:
    """Tiger1 as the published scores compare it: result i with the box of image i, though it is of image i + 5.

    The boxes of the first five images are needed for all of it; without them the rest is compared.
    """
    truth = np.concatenate([video.before, video.boxes])
    skip = early - len(video.before)
    count = min(len(truth), len(found) - skip)
    return Scored(video=video, truth=truth[:count], found=found[skip : skip + count])


def _read_json(path: Path) -> tuple[np.ndarray, int]:
    """Boxes and the number of their first frame."""
    try:
        content: Any = json.loads(path.read_text())
        run = content[0] if isinstance(content, list) else content
        if run.get("resType", "rect") != "rect":
            raise TypeError(f"resType is {run['resType']!r}, not rect")
        boxes = np.array(run["res"], np.float64)
        start = int(run.get("startFrame", 1))
        end = int(run.get("endFrame", start + len(boxes) - 1))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: no boxes of a tracker ({error!r}); it needs res, startFrame and endFrame") from error
    if boxes.ndim != 2 or boxes.shape[1] != 4 or end - start + 1 != len(boxes):
        raise ValueError(f"{path}: res has shape {boxes.shape} for frames {start} to {end}; it needs a box per frame")
    return boxes, start
