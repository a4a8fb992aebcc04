"""JHMDB poses: joints of the first frame propagated along frozen features; percentage of correct key points (PCK)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipmill.datasets.jhmdb import BONES, JOINTS, PosedVideo, joint_positions, read
from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_csv
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.overlay import skeleton, thumbnail, write_sheet, write_video
from clipmill.tools.evaluate.presets import JHMDB, PoseProtocol
from clipmill.tools.evaluate.propagation import (
    Maps,
    Overrides,
    bilinear,
    feature_maps,
    grid_of,
    placed,
    read_picture,
    soft_labels,
)
from clipmill.tools.pictures import evenly, strip
from clipmill.tools.pose import THRESHOLDS, errors, heat_maps, pck, read_joints

CLIPS, JOINT_TABLE, SHEET, VIDEOS = "clips.csv", "joints.csv", "contact_sheet.png", "videos"
_IN_SHEET, _SHEET_ROWS = 6, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the JHMDB benchmark."""

    preset: Literal["crw", "uvc", "vfs"] = "crw"
    """Published protocol; size, colour, context, topk, tau and radius change single settings of it."""
    split: int = 1
    """Number of the split whose test clips are taken."""
    clips: tuple[str, ...] = ()
    """Only these clips, as CLASS/CLIP."""
    videos: bool = False
    """Write a video per clip: found joints in red, the truth in white."""
    overrides: Overrides = field(default_factory=Overrides)
    maps: Maps = field(default_factory=Maps)

    @property
    def protocol(self) -> PoseProtocol:
        """The preset with the changes."""
        preset = JHMDB[self.preset]
        return replace(preset, protocol=self.overrides.apply(preset.protocol))


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Track the joints of the test clips of a JHMDB folder. See `Evaluator`.

    PCK is averaged over joints, each over the frames of all clips. Besides the preset's way of counting, PCK@0.1 and
    PCK@0.2 are given as CRW counts (without frame 0) and as VFS does (with it, joints at x = 0 left out).
    """
    clips = read(root, split=config.split, clips=config.clips)
    pose = config.protocol
    counted: dict[str, list[np.ndarray]] = {"": [], "-crw": [], "-vfs": []}
    rows, sheet = [], []
    with placed(encoder, config.maps):
        for number, clip in enumerate(clips):
            truth = joint_positions(clip.joints)[..., : len(clip.frames)] - 1
            frames = clip.frames[: truth.shape[2]]
            found = np.stack(list(track(encoder, clip, truth[..., 0], len(frames), pose, config.maps)), -1)
            for name, (first_frame, strict) in _countings(pose).items():
                counted[name].append(errors(found, truth, first_frame=first_frame, strict=strict))
            rows.append({"clip": clip.name, "frames": len(frames), **_means(pck(counted[""][-1:]))})
            overlay = _overlays(clip, found, truth)
            if config.videos:
                write_video(out / VIDEOS / f"{clip.name.replace('/', '-')}.mp4", map(overlay, range(len(frames))))
            if len(sheet) < _SHEET_ROWS:
                title = f"{clip.name}   PCK@0.2 {rows[-1]['PCK@0.2']:.3f}"
                sheet.append((title, strip([thumbnail(overlay(t)) for t in evenly(len(frames), _IN_SHEET)])))
            progress("poses", number + 1, len(clips), "clips")
    shares = pck(counted[""])
    if np.isnan(shares).all():
        raise ValueError(f"{root}: no joint counts in any frame; with one frame per clip use --preset vfs")
    metrics = _means(shares)
    for name in ("-crw", "-vfs"):
        other = _means(pck(counted[name]))
        metrics |= {f"{key}{name}": other[key] for key in ("PCK@0.1", "PCK@0.2") if np.isfinite(other[key])}
    write_csv(out / CLIPS, rows)
    joints = [{"joint": name, **_means(shares[:, j : j + 1])} for j, name in enumerate(JOINTS)]
    write_csv(out / JOINT_TABLE, joints)
    write_sheet(out / SHEET, sheet)
    videos = [f"{VIDEOS}/{clip.name.replace('/', '-')}.mp4" for clip in clips if config.videos]
    return Report(
        benchmark="jhmdb",
        metrics=metrics,
        rows=[_finite(row) for row in rows],
        artefacts=[CLIPS, JOINT_TABLE, SHEET, *videos],
        settings={
            "clips": len(clips),
            "stage": config.maps.stage_of(encoder),
            "protocol": asdict(pose),
            "config": to_json(config),
        },
        digests={"encoder": encoder_digest(encoder)},
    )


def track(
    encoder: Encoder, clip: PosedVideo, first_2J: np.ndarray, num_frames: int, pose: PoseProtocol, maps: Maps
) -> Iterator[np.ndarray]:
    """Joint positions (2, J) in pixels of every frame, (-1, -1) where one is lost, from those of the first frame.

    The encoder must be in eval mode and on the device of ``maps``.
    """
    height, width, _ = read_picture(clip.frames[0]).shape
    native = (height, width)
    features = feature_maps(encoder, clip.frames[:num_frames], native, pose.protocol, maps)
    opening = next(features)
    grid = grid_of(opening)
    at_grid = pose.draw_at == "grid"
    scale = np.array([[grid[1] / width], [grid[0] / height]]) if at_grid else np.ones((2, 1))
    rows, columns = grid if at_grid else native
    first = torch.from_numpy(heat_maps(first_2J * scale, pose.sigma, rows, columns, pose.background))
    soft = soft_labels(chain([opening], features), bilinear(first[None], grid)[0], pose.protocol, maps)
    for number, maps_KHW in enumerate(chain([first], soft)):
        shown = maps_KHW if at_grid or not number else bilinear(maps_KHW[None], native)[0]
        joints = read_joints(shown[int(pose.background) :], pose.read_top)
        yield np.where(joints[:1] < 0, -1.0, joints / scale)


def _countings(pose: PoseProtocol) -> dict[str, tuple[bool, bool]]:
    """Ways of counting by the suffix of their metrics: whether frame 0 counts, whether x must be above 0."""
    return {"": (pose.first_frame, pose.strict), "-crw": (False, False), "-vfs": (True, True)}


def _means(shares: np.ndarray) -> dict[str, float]:
    """PCK per threshold, the mean over the joints that count; NaN if none does."""
    counts = ~np.isnan(shares)
    mean = np.where(counts.any(1), np.where(counts, shares, 0).sum(1) / np.maximum(counts.sum(1), 1), np.nan)
    return {f"PCK@{threshold}": float(value) for threshold, value in zip(THRESHOLDS, mean, strict=True)}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}


def _overlays(clip: PosedVideo, found_2JT: np.ndarray, truth_2JT: np.ndarray):
    def overlay(t: int) -> np.ndarray:
        return skeleton(read_picture(clip.frames[t]), found_2JT[..., t], truth_2JT[..., t], BONES)

    return overlay
