"""VIP human parts: the first frame's parts propagated along frozen features; mean intersection over union."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipmill.datasets.davis import MaskedVideo, label_map
from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.datasets.vip import CLASSES, read
from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_atomic, write_csv
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.overlay import laid_over, thumbnail, write_sheet
from clipmill.tools.evaluate.presets import VIP
from clipmill.tools.evaluate.propagation import Maps, Overrides, Protocol, placed, read_picture, resized_ids, segment
from clipmill.tools.pictures import evenly, strip

PARTS, VIDEO_TABLE, SHEET, MASKS = "parts.csv", "videos.csv", "contact_sheet.png", "masks"
_IN_SHEET, _SHEET_ROWS = 6, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the VIP benchmark."""

    preset: Literal["uvc", "contrastcorr", "crw", "vfs"] = "uvc"
    """Published protocol; size, colour, context, topk, tau and radius change single settings of it."""
    split: str = "val"
    """Name of the list of videos."""
    videos: tuple[str, ...] = ()
    """Only these videos."""
    overrides: Overrides = field(default_factory=Overrides)
    maps: Maps = field(default_factory=Maps)

    @property
    def protocol(self) -> Protocol:
        """The preset with the changes."""
        return self.overrides.apply(VIP[self.preset])

    @property
    def copy_first(self) -> bool:
        """Whether frame 0 is scored as it was given; CRW scores it after the way to the grid and back."""
        return self.preset != "crw"


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Propagate the parts of the videos of a VIP folder. See `Evaluator`.

    One confusion matrix over all pixels of all frames of all videos, frame 0 included; truth 255 is left out.
    """
    videos = read(root, split=config.split, videos=config.videos)
    total, done = sum(len(video.frames) for video in videos), 0
    whole = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    table, sheet = [], []
    with placed(encoder, config.maps):
        for video in videos:
            own, pictures, shown = np.zeros_like(whole), [], set(evenly(len(video.frames), _IN_SHEET))
            found = segment(
                encoder, video.frames, _first(video), config.protocol, config.maps, copy_first=config.copy_first
            )
            for t, ids in enumerate(found):
                own += confusion(_truth(video.masks[t]), ids)
                write_atomic(out / MASKS / video.name / video.masks[t].name, label_map_bytes(ids))
                if t in shown:
                    pictures.append(thumbnail(laid_over(read_picture(video.frames[t]), ids)))
                done += 1
                progress("parts", done, total, "frames")
            whole += own
            table.append({"video": video.name, "frames": len(video.frames), **part_scores(own)})
            if len(sheet) < _SHEET_ROWS:
                sheet.append((f"{video.name}   mIoU {table[-1]['mIoU']:.3f}", strip(pictures)))
    rows = part_rows(whole)
    write_csv(out / PARTS, rows)
    write_csv(out / VIDEO_TABLE, table)
    write_sheet(out / SHEET, sheet)
    return Report(
        benchmark="vip",
        metrics=part_scores(whole),
        rows=rows,
        artefacts=[PARTS, VIDEO_TABLE, SHEET],
        settings={
            "videos": len(videos),
            "frames": total,
            "first_frame": "copied" if config.copy_first else "propagated",
            "stage": config.maps.stage_of(encoder),
            "protocol": asdict(config.protocol),
            "config": to_json(config),
        },
        digests={"encoder": encoder_digest(encoder)},
    )


def confusion(truth: np.ndarray, found: np.ndarray, classes: int = len(CLASSES)) -> np.ndarray:
    """(classes, classes) int64 pixel counts: rows truth, columns prediction. Truth outside the classes is left out.

    A prediction of another size is first resized to the truth, each pixel to the nearest.
    """
    if found.shape != truth.shape:
        found = resized_ids(found, (truth.shape[0], truth.shape[1]))
    counts = truth < classes
    pairs = truth[counts].astype(np.int64) * classes + found[counts]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def part_scores(matrix: np.ndarray) -> dict[str, float]:
    """Means of a confusion matrix as fractions of 1.

    mIoU: over classes that occur in truth or prediction. accuracy: of pixels. mean_accuracy: over classes of the
    truth. fw_IoU: IoU weighted by the pixels of the truth.
    """
    right, true, union = _parts(matrix)
    iou = right / np.maximum(union, 1)
    total = max(int(true.sum()), 1)
    return {
        "mIoU": float(iou[union > 0].mean()) if union.any() else 0.0,
        "accuracy": float(right.sum() / total),
        "mean_accuracy": float((right[true > 0] / true[true > 0]).mean()) if true.any() else 0.0,
        "fw_IoU": float((true * iou).sum() / total),
    }


def part_rows(matrix: np.ndarray) -> list[dict[str, Any]]:
    """IoU and accuracy of every class that occurs; None where there is nothing to divide by."""
    right, true, union = _parts(matrix)
    return [
        {
            "part": CLASSES[number],
            "pixels": int(true[number]),
            "IoU": float(right[number] / union[number]),
            "accuracy": float(right[number] / true[number]) if true[number] else None,
        }
        for number in np.flatnonzero(union)
    ]


def _parts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class: pixels that are right, pixels of the truth, pixels of truth or prediction."""
    right, true = np.diag(matrix), matrix.sum(1)
    return right, true, true + matrix.sum(0) - right


def _truth(path: Path) -> np.ndarray:
    ids = label_map(path)
    wrong = np.unique(ids[(ids >= len(CLASSES)) & (ids != 255)])
    if len(wrong):
        raise ValueError(f"{path}: id {wrong[0]} is no part; ids are 0 to {len(CLASSES) - 1}, and 255 is left out")
    return ids


def _first(video: MaskedVideo) -> np.ndarray:
    ids = _truth(video.masks[0])
    return np.where(ids == 255, 0, ids).astype(np.uint8)
