"""Planners that take single frames from equal parts of a whole video: tuples for VCLR, segments for TSN and TSM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.views import Drawn, Span, View, time_of


@lru_cache(maxsize=8)
def shuffles(count: int) -> tuple[tuple[int, ...], ...]:
    """The orders of ``count`` frames: the temporal one first, then all but it and its exact reversal.

    >>> shuffles(3)
    ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))
    """
    plain = tuple(range(count))
    return (plain, *(order for order in permutations(plain) if order not in (plain, plain[::-1])))


def segment_bounds(num_frames: int, count: int) -> list[tuple[int, int]]:
    """(first, stop) of ``count`` segments of floor(num_frames / count) frames; the last runs to the end.

    >>> segment_bounds(11, 3)
    [(0, 3), (3, 6), (6, 11)]
    """
    length = num_frames // count
    stops = [length * number for number in range(1, count)] + [num_frames]
    return list(zip([0, *stops[:-1]], stops, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuples:
    """Two tuples of one frame per segment, and one frame of the first tuple once more (VCLR). A `Planner`.

    views: the query tuple, the key tuple, and a picture of the anchor, which is the first or the last frame of the
    query tuple. From every segment (`segment_bounds`) two different frames are drawn, one for the key tuple and one
    for the query tuple; both tuples come in temporal order. What else was drawn travels along: ``anchor``, the
    anchor's place in its tuple; ``query_order`` and ``key_order``, numbers of `shuffles`, half of them 0.
    """

    views: tuple[View, View, View]

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        count = self.views[0].num_frames
        key, query = [], []
        for first, stop in segment_bounds(record.num_frames, count):
            other, own = rng.distinct(stop - first, 2)
            key.append(first + other)
            query.append(first + own)
        anchor = count - 1 if rng.coin() else 0
        orders = [1 + rng.integer(len(shuffles(count)) - 1) if rng.coin() else 0 for _ in range(2)]
        frames = (query, key, [query[anchor]])
        spans = tuple(
            Span(view=view.name, frames=tuple(chosen), start_s=time_of(record, chosen[0]))
            for view, chosen in zip(self.views, frames, strict=True)
        )
        return Drawn(spans, {"anchor": anchor, "query_order": orders[0], "key_order": orders[1]})

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with two frames in every segment."""
        count = self.views[0].num_frames
        if count < 3 or self.views[1].num_frames != count or self.views[2].num_frames != 1:
            shape = [view.num_frames for view in self.views]
            raise ValueError(f"Tuples needs views of N, N and 1 frames with N >= 3, got {shape}")
        return index.column("num_frames") >= 2 * count


# --- TSN ----------------------------------------------------------------------------------------------------


def tsn_train_frames(num_frames: int, count: int, rng: Draws) -> list[int]:
    """One random frame of each segment; a video of fewer frames than segments repeats some, and draws nothing.

    L. Wang et al., "Temporal Segment Networks", ECCV 2016, with the arithmetic of mmaction's ``SampleFrames``.

    >>> tsn_train_frames(2, 4, Draws(0))
    [0, 0, 1, 2]
    """
    length = num_frames // count
    if length > 0:
        return [number * length + rng.integer(length) for number in range(count)]
    return [round(number * num_frames / count) for number in range(count)]


def tsn_test_frames(num_frames: int, count: int) -> list[int]:
    """The middle frame of each segment.

    >>> tsn_test_frames(60, 25)[12]  # 12 * 2.4 + 1.2 is a little less than 30
    29
    """
    length = num_frames / count
    return [int(number * length + length / 2) for number in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TsnSegments:
    """One frame of each of N equal segments, N = the views' num_frames: random, or the ``middle`` one. A `Planner`.

    Views are drawn independently. Numbers beyond the end of a short video wrap around.
    """

    views: tuple[View, ...]
    middle: bool = False

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        spans = []
        for view in self.views:
            count, have = view.num_frames, record.num_frames
            frames = tsn_test_frames(have, count) if self.middle else tsn_train_frames(have, count, rng)
            inside = tuple(frame % have for frame in frames)
            spans.append(Span(view=view.name, frames=inside, start_s=time_of(record, inside[0])))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0
