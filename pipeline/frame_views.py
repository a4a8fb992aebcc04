"""Planners that take single frames: one from every part of a video (VFS), or two a little apart (ContrastCorr)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.views import Drawn, Span, View, time_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """One frame from each of equal segments of the whole video, in order; the first view takes the first segments.

    A `Planner`; there are as many segments as all views have frames.
    """

    views: tuple[View, ...]

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        count = sum(view.num_frames for view in self.views)
        room = segment_length(record.num_frames, count)
        frames = segment_frames(record.num_frames, count, [rng.integer(room) for _ in range(count if room else 0)])
        spans, first = [], 0
        for view in self.views:
            part = frames[first : first + view.num_frames]
            spans.append(Span(view=view.name, frames=part, start_s=time_of(record, part[0])))
            first += view.num_frames
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0


def segment_length(num_frames: int, segments: int) -> int:
    """Frames that an offset is drawn from; 0 when there are too few to draw. The + 1 is that of VFS' released code."""
    return (num_frames + 1) // segments


def segment_frames(num_frames: int, segments: int, offsets: Sequence[int]) -> tuple[int, ...]:
    """Frame numbers from one offset per segment in [0, `segment_length`); without room, spread evenly.

    Where the segments divide num_frames + 1, the last number can be num_frames, which wraps around to frame 0.

    >>> segment_frames(15, 8, [1] * 8), segment_frames(5, 8, [])
    ((1, 3, 5, 7, 9, 11, 13, 0), (0, 1, 2, 2, 3, 4, 4, 0))
    """
    room = segment_length(num_frames, segments)
    if room:
        frames = [number * room + offset for number, offset in zip(range(segments), offsets, strict=True)]
    else:
        frames = [round(number * (num_frames + 1) / segments) for number in range(segments)]
    return tuple(frame % num_frames for frame in frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePairs:
    """Two frames, the second 1 to ``gap`` after the first; short videos give any two. A `Planner`.

    With each sample travel the frame's size (``height``, ``width``) and numbers in [0, 1) that two geometric
    augmentations may share (``draw0`` ... ``draw{extras - 1}``).
    """

    views: tuple[View, View]
    gap: int = 50
    extras: int = 0

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        rooms = pair_rooms(record.num_frames, self.gap)
        pair = frame_pair(record.num_frames, self.gap, [low + rng.integer(count) for low, count in rooms])
        spans = tuple(
            Span(view=view.name, frames=(frame,), start_s=time_of(record, frame))
            for view, frame in zip(self.views, pair, strict=True)
        )
        extras = {f"draw{number}": rng.uniform() for number in range(self.extras)}
        return Drawn(spans, {"height": float(record.height), "width": float(record.width), **extras})

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0


def pair_rooms(num_frames: int, gap: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Lowest value and number of values of the two draws of `frame_pair`."""
    end = num_frames - 1
    return ((0, end - gap + 1), (1, gap)) if end > gap else ((0, end + 1), (0, end + 1))


def frame_pair(num_frames: int, gap: int, draws: Sequence[int]) -> tuple[int, int]:
    """Frame numbers of reference and target: the second draw is a distance, in short videos a frame.

    >>> frame_pair(100, 50, [3, 20]), frame_pair(51, 50, [30, 7])
    ((3, 23), (30, 7))
    """
    first, second = draws
    return (first, first + second) if num_frames - 1 > gap else (first, second)
