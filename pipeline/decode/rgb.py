"""Backends of libraries that open containers and give RGB.

A slot holds I420 whatever the backend, so their pictures are converted back with the record's own matrix and range;
the path of all other backends stays as it is. What is lost: such libraries round RGB down, by about one level, and clip
what lies outside of it. Planes come back within 3 levels where the picture's colours are inside RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode import mp4
from clipmill.pipeline.decode.decoder import DecodeError, Emit, Planes, UnsupportedCodecError, check
from clipmill.pipeline.decode.runs import Feed, Run, runs
from clipmill.pipeline.jit import compiled
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader
from clipmill.pipeline.spec import yuv_to_rgb_matrix

_BITS = 16  # of the fraction in the fixed-point matrix


@dataclass(frozen=True, slots=True)
class Clip:
    """A small mp4 and where in it the wanted frames are.

    data: the file. places: frame numbers in the file, sorted. numbers: frame numbers in the record. delay: the time
    of frame 0 of the file in frames (not 0 where frames are reordered).
    """

    data: bytes
    places: list[int]
    numbers: list[int]
    delay: int


class RgbDecoder:
    """A `Decoder` over ``pictures(clip) -> (len(clip.places), height, width, 3) uint8 RGB``.

    codecs: what the library takes. errors: what it raises for media that it cannot decode. by_time: it finds frames by
    their time; a library that counts them gives wrong ones where a decoder leaves some out, which it may behind a key
    frame that is not the start of the stream. So one that counts is given records without reordered frames only.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        pictures: Callable[[Clip], np.ndarray],
        codecs: Sequence[str],
        errors: tuple[type[Exception], ...],
        by_time: bool = False,
    ) -> None:
        self._name = name
        self._feed = Feed(reader)
        self._pictures = pictures
        self._codecs = codecs
        self._errors = (*errors, ValueError)
        self._by_time = by_time
        self.decoded = 0

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._feed.read_s

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        check(self._name, record, frames, self._codecs)
        if len(record.presentation) and not self._by_time:
            raise UnsupportedCodecError(
                f"{record.shard}: {record.key!r} has reordered frames, which decoder {self._name!r} may confuse; "
                "choose decoder 'auto'"
            )
        for clip in clips(self._feed, record, frames):
            try:
                rgb = self._pictures(clip)
            except self._errors as error:
                raise DecodeError(f"{record.shard}: {record.key!r} does not decode ({error})") from error
            wanted = (len(clip.places), record.height, record.width, 3)
            if rgb.shape != wanted:
                raise DecodeError(f"{record.shard}: {record.key!r} decodes to {rgb.shape}, packed {wanted}")
            self.decoded += len(rgb)
            for number, picture in zip(clip.numbers, rgb, strict=True):
                emit(number, to_planes(picture, record.codec))


def clips(feed: Feed, record: VideoRecord, frames: Sequence[int]) -> Iterator[Clip]:
    """The needed packets as mp4: one file, or one per run where frames are reordered.

    Groups of pictures without reordering are closed and may follow each other in any selection. Groups with it may be
    open: the frames shown before the first key frame of a file are left out of it, for they need the group before.
    """
    chosen = runs(record, frames)
    if len(record.presentation):
        for run, packets in feed.packets(record, [_from_group_before(record, run) for run in chosen]):
            yield _reordered(record, run, packets)
        return
    everything, keys, places, numbers = [], [], [], []
    for run, packets in feed.packets(record, chosen):
        keys.append(len(everything))
        places += [keys[-1] + number - run.first for number in run.wanted]
        numbers += run.wanted
        everything += packets
    yield Clip(mp4.wrap(record, everything, np.arange(len(everything)), keys), places, numbers, 0)


def _from_group_before(record: VideoRecord, run: Run) -> Run:
    """The same from one group earlier: FFmpeg before 6 leaves out some frames behind the key frame it starts at."""
    place = int(np.searchsorted(record.keyframes, run.first))
    return Run(int(record.keyframes[max(place - 1, 0)]), run.stop, run.wanted)


def _reordered(record: VideoRecord, run: Run, packets: list[memoryview]) -> Clip:
    shown = run.numbers(record)
    kept = np.flatnonzero(shown >= shown[0])
    pts = np.argsort(np.argsort(shown[kept]))
    places = np.searchsorted(np.sort(shown[kept]), run.wanted).tolist()
    data = mp4.wrap(record, [packets[i] for i in kept], pts, [0])
    return Clip(data, places, list(run.wanted), mp4.delay(pts))


# --- RGB back to I420 ---------------------------------------------------------------------------------------


def to_planes(rgb_HWC: np.ndarray, codec: CodecConfig) -> Planes:
    """I420 planes of an RGB picture; the chroma of two by two pixels is averaged. Height and width must be even."""
    height, width = rgb_HWC.shape[:2]
    y = np.empty((height, width), np.uint8)
    u, v = np.empty((2, height // 2, width // 2), np.uint8)
    _convert(np.ascontiguousarray(rgb_HWC), *_fixed(codec.matrix, codec.full_range), y, u, v)
    return y, u, v


@lru_cache(maxsize=8)
def _fixed(matrix: str, full_range: bool) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) and (3,) int32: the inverse of the matrix to RGB in fixed point, half a level added to the shift.

    The rows of chroma take sums over four pixels.
    """
    mix, shift = yuv_to_rgb_matrix(matrix, full_range)
    back = np.linalg.inv(mix)
    scale = 1 << _BITS
    pixels = np.array([[1], [4], [4]])
    return (
        np.rint(back / 255.0 / pixels * scale).astype(np.int32),
        np.rint((0.5 - back @ shift) * scale).astype(np.int32),
    )


@compiled
def _convert(rgb, mix, shift, y, u, v):
    height, width = y.shape
    bits = np.int32(_BITS)
    low, high = np.int32(0), np.int32(255)
    sums = np.empty((3, width // 2), np.int32)
    for i in range(height):
        line, out = rgb[i], y[i]
        for j in range(width):
            r, g, b = np.int32(line[j, 0]), np.int32(line[j, 1]), np.int32(line[j, 2])
            out[j] = min(max((mix[0, 0] * r + mix[0, 1] * g + mix[0, 2] * b + shift[0]) >> bits, low), high)
        if i & 1 == 0:
            continue
        above = rgb[i - 1]
        for c in range(3):
            for j in range(width // 2):
                sums[c, j] = (
                    np.int32(line[2 * j, c])
                    + np.int32(line[2 * j + 1, c])
                    + np.int32(above[2 * j, c])
                    + np.int32(above[2 * j + 1, c])
                )
        for j in range(width // 2):
            r, g, b = sums[0, j], sums[1, j], sums[2, j]
            u[i >> 1, j] = min(max((mix[1, 0] * r + mix[1, 1] * g + mix[1, 2] * b + shift[1]) >> bits, low), high)
            v[i >> 1, j] = min(max((mix[2, 0] * r + mix[2, 1] * g + mix[2, 2] * b + shift[2]) >> bits, low), high)
