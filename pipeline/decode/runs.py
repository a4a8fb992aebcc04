"""Which packets must be read and decoded to get some frames of a record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from clipmill.pipeline.decode.decoder import DecodeError
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

_GAP_BYTES = 32 << 10  # to read and verify so many bytes more costs no more than another read


@dataclass(frozen=True, slots=True)
class Run:
    """Packets [first, stop) from a key packet on, and the wanted frame numbers they decode to, sorted."""

    first: int
    stop: int
    wanted: tuple[int, ...]

    def numbers(self, record: VideoRecord) -> np.ndarray:
        """(stop - first,) frame number of each packet."""
        if len(record.presentation):
            return record.presentation[self.first : self.stop].astype(np.int64)
        return np.arange(self.first, self.stop)


def runs(record: VideoRecord, frames: Sequence[int]) -> list[Run]:
    """One run per group of pictures that holds any of the ``frames`` (sorted, distinct), in order.

    Where frames leave the decoder in another order than their packets come, a frame that is shown before the key
    frame of its group belongs to the group before, whose run then reaches beyond that key packet.
    """
    keys = record.keyframes.astype(np.int64)
    wanted = np.asarray(frames, np.int64)
    reordered = len(record.presentation) > 0
    try:
        packets = np.argsort(record.presentation, kind="stable")[wanted] if reordered else wanted
        groups = np.searchsorted(record.presentation[keys] if reordered else keys, wanted, "right") - 1
    except IndexError as error:
        raise DecodeError(f"{record.shard}: {record.key!r}: its index names packets that it does not have") from error
    if len(groups) and groups[0] < 0:
        raise DecodeError(f"{record.shard}: {record.key!r}: frame {frames[0]} has no key frame before it")
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    return [
        Run(int(keys[groups[low]]), int(packets[low:high].max()) + 1, tuple(wanted[low:high].tolist()))
        for low, high in pairwise(edges.tolist())
    ]


class Feed:
    """Reads the packets of runs, neighbours in one go, and counts the seconds in ``read_s``."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.read_s = 0.0

    def packets(self, record: VideoRecord, wanted: Sequence[Run]) -> Iterator[tuple[Run, list[memoryview]]]:
        """Every run with its packets."""
        for together, packets in self.reads(record, wanted):
            first = together[0].first
            for run in together:
                yield run, packets[run.first - first : run.stop - first]

    def reads(self, record: VideoRecord, wanted: Sequence[Run]) -> Iterator[tuple[Sequence[Run], list[memoryview]]]:
        """Runs that are read together, and all packets from the first of them on, one behind the other in memory."""
        for together, first, stop in reads(record, wanted, self._reader.waste):
            begin_s = time.perf_counter()
            packets = self._reader.packets(record, first, stop)
            self.read_s += time.perf_counter() - begin_s
            yield together, packets


def reads(
    record: VideoRecord, wanted: Sequence[Run], waste: float = math.inf
) -> Iterator[tuple[Sequence[Run], int, int]]:
    """Runs that are read together because they are close, and the packets [first, stop) of that read.

    waste: unwanted bytes between the runs, as a share of the wanted ones, that a read may have.
    """
    start = 0
    while start < len(wanted):
        stop = start + 1
        useless = 0
        while stop < len(wanted):
            gap = _gap_bytes(record, wanted[stop - 1], wanted[stop])
            useless += gap
            if gap > _GAP_BYTES or (waste < math.inf and useless > waste * _bytes(record, wanted[start : stop + 1])):
                break
            stop += 1
        yield wanted[start:stop], wanted[start].first, max(run.stop for run in wanted[start:stop])
        start = stop


def _bytes(record: VideoRecord, wanted: Sequence[Run]) -> int:
    return sum(int(record.packet_sizes[run.first : run.stop].sum(dtype=np.int64)) for run in wanted)


def _gap_bytes(record: VideoRecord, before: Run, after: Run) -> int:
    if after.first <= before.stop:
        return 0
    return int(record.packet_sizes[before.stop : after.first].sum(dtype=np.int64))
