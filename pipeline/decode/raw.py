"""The raw backend: I420 frames are read where they lie; there is nothing to decode."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Emit, check
from clipmill.pipeline.decode.runs import Feed, Run
from clipmill.pipeline.decode.targets import FRAME, copy_stored
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader


def new(reader: Reader) -> Decoder:
    """The backend's constructor."""
    return RawDecoder(reader)


class RawDecoder:
    """Reads only the wanted frames. Every packet is one frame of height * width * 3 / 2 bytes: Y, U, V."""

    def __init__(self, reader: Reader) -> None:
        self._feed = Feed(reader)
        self.decoded = 0

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._feed.read_s

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        height, width = record.height, record.width
        area = height * width
        for numbers, first, stored in self._reads(record, frames):
            for number in numbers:
                data = stored[(number - first) * area * 3 // 2 :][: area * 3 // 2]
                u, v = data[area:].reshape(2, height // 2, width // 2)
                self.decoded += 1
                emit(number, (data[:area].reshape(height, width), u, v))

    def fill(self, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> float:
        """See `clipmill.pipeline.decode.targets.fill`."""
        copy_s = 0.0
        wanted = targets[:, FRAME]
        for numbers, first, stored in self._reads(record, np.unique(wanted).tolist()):
            start_s = time.perf_counter()
            rows = targets[wanted.searchsorted(numbers[0]) : wanted.searchsorted(numbers[-1], "right")].copy()
            rows[:, FRAME] -= first
            copy_stored(stored, record.height, record.width, rows, payload)
            copy_s += time.perf_counter() - start_s
            self.decoded += len(numbers)
        return copy_s

    def _reads(self, record: VideoRecord, frames: Sequence[int]) -> Iterator[tuple[list[int], int, np.ndarray]]:
        """(wanted frame numbers, number of the first frame, all its bytes and those of the frames behind it)."""
        check("raw", record, frames, ("raw",))
        size = record.height * record.width * 3 // 2
        sizes = record.packet_sizes[frames[0] : frames[-1] + 1]
        if (wrong := np.flatnonzero(sizes != size)).size:
            raise DecodeError(
                f"{record.shard}: frame {frames[0] + wrong[0]} of {record.key!r} has {sizes[wrong[0]]} bytes, "
                f"{record.width}x{record.height} needs {size}"
            )
        for together, packets in self._feed.reads(record, [Run(number, number + 1, (number,)) for number in frames]):
            stored = np.frombuffer(cast(bytes, packets[0].obj), np.uint8)
            yield [run.first for run in together], together[0].first, stored
