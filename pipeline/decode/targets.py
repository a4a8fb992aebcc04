"""What a slot wants of one record, and how decoded frames get there.

Targets are an (R, 6) int64 array with the columns below, sorted by frame: the region x, y, w, h (even, in pixels) of a
frame goes to ``payload[offset:]`` as packed I420. One frame may be wanted several times.
"""

from __future__ import annotations

import time

import numpy as np

from clipmill.pipeline.decode.decoder import Decoder, Planes
from clipmill.pipeline.jit import compiled
from clipmill.pipeline.record import VideoRecord

FRAME, X, Y, W, H, OFFSET = range(6)


def fill(decoder: Decoder, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> float:
    """Decode and copy all targets of a record; returns the seconds spent on copying.

    A decoder with a method ``fill`` of this form (without the decoder) does it by itself, others emit whole frames.
    Raises what `Decoder.decode` raises.
    """
    direct = getattr(decoder, "fill", None)
    if direct is not None:
        return direct(record, targets, payload)
    sink = Sink(targets, payload)
    decoder.decode(record, np.unique(targets[:, FRAME]).tolist(), sink.put)
    return sink.copy_s


class Sink:
    """Copies regions of emitted frames to their places."""

    __slots__ = ("_frames", "_payload", "_targets", "copy_s")

    def __init__(self, targets: np.ndarray, payload: np.ndarray) -> None:
        self.copy_s = 0.0
        self._targets = targets
        self._payload = payload
        self._frames = targets[:, FRAME]

    def put(self, frame: int, planes: Planes) -> None:
        """Take what is wanted of a frame; see `Decoder.decode`."""
        start_s = time.perf_counter()
        low, high = self._frames.searchsorted((frame, frame + 1))
        y_plane, u_plane, v_plane = planes
        for _, x, y, w, h, offset in self._targets[low:high].tolist():
            area = w * h
            luma = self._payload[offset : offset + area].reshape(h, w)
            u, v = self._payload[offset + area : offset + area * 3 // 2].reshape(2, h // 2, w // 2)
            half = (slice(y // 2, (y + h) // 2), slice(x // 2, (x + w) // 2))
            luma[...] = y_plane[y : y + h, x : x + w]
            u[...] = u_plane[half]
            v[...] = v_plane[half]
        self.copy_s += time.perf_counter() - start_s


@compiled
def copy_stored(frames, height, width, targets, payload):
    """Copy all targets from whole I420 frames of this size that lie one after the other in ``frames``."""
    area, quarter = height * width, (height // 2) * (width // 2)
    for row in range(len(targets)):
        x, y, w, h, to = targets[row, X], targets[row, Y], targets[row, W], targets[row, H], targets[row, OFFSET]
        base = targets[row, FRAME] * (area * 3 // 2)
        to = _copy_plane(frames, base, width, x, y, w, h, payload, to)
        x, y, w, h = x // 2, y // 2, w // 2, h // 2
        to = _copy_plane(frames, base + area, width // 2, x, y, w, h, payload, to)
        _copy_plane(frames, base + area + quarter, width // 2, x, y, w, h, payload, to)


@compiled
def _copy_plane(source, base, stride, x, y, w, h, payload, to):
    start = base + y * stride + x
    if w == stride:
        payload[to : to + w * h] = source[start : start + w * h]
        return to + w * h
    for _ in range(h):
        payload[to : to + w] = source[start : start + w]
        start += stride
        to += w
    return to
