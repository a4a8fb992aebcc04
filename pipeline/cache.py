"""A cache of decoded frames: later epochs of a small data set run at the speed of copying memory.

It keeps whole records as I420 in memory that threads and processes share. Which records is decided before the first
epoch: in the order of a hash of their uid, as many as fit the budget. Records never leave, so a share of
budget / (size of all frames) of the clips comes from the cache in every epoch but the first. With random access in
every epoch no policy that evicts does better. A record is decoded whole when a clip of it is first wanted.

The cache never changes a batch: what cannot be decoded whole is read from the shard every time.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from clipmill.pipeline.decode.decoder import DecodeError, Decoder
from clipmill.pipeline.decode.targets import copy_stored, fill
from clipmill.pipeline.draws import fold_array
from clipmill.pipeline.memory import SharedBuffer
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.shard import ShardError

_EMPTY, _BUSY, _READY, _REFUSED = range(4)
_PAGE = 4096
_GIB = 1 << 30


class FrameCache:
    """Decoded frames of the records that were chosen for it.

    index: the records of the loader. budget_bytes: most that the frames take. path: of the cache of another process
    with the same index and budget; None makes a new one.
    """

    def __init__(self, index: ShardIndex, budget_bytes: int, path: str | None = None) -> None:
        if path is None:
            _check_memory(budget_bytes)
        self._index = index
        self._budget_bytes = budget_bytes
        self._starts, size = _places(index, budget_bytes)
        self._buffer = SharedBuffer(path)
        self._memory = self._buffer.reserve(len(index) + size)
        self._state = self._memory[: len(index)]  # one byte per record, zero (`_EMPTY`) at first

    @property
    def path(self) -> str:
        """Where another process finds this cache."""
        return self._buffer.path

    def __reduce__(self) -> tuple:
        return FrameCache, (self._index, self._budget_bytes, self.path)

    @property
    def records(self) -> int:
        """Number of records that have a place."""
        return int((self._starts >= 0).sum())

    @property
    def ready(self) -> int:
        """Number of records that are in the cache now."""
        return int((self._state == _READY).sum())

    def fill(self, decoder: Decoder, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> float:
        """As `clipmill.pipeline.decode.targets.fill`, by way of the cache."""
        number = record.index
        start = int(self._starts[number])
        if start < 0 or (self._state[number] != _READY and not self._load(decoder, record, start)):
            return fill(decoder, record, targets, payload)
        start_s = time.perf_counter()
        size = record.num_frames * _frame_bytes(record.height, record.width)
        memory = self._memory[start : start + size]
        copy_stored(memory, record.height, record.width, targets, payload)
        return time.perf_counter() - start_s

    def unread(self, record: VideoRecord, frames: np.ndarray) -> np.ndarray:
        """Which frames `fill` will read for a clip of ``frames``: none that are here, all if it takes the record in."""
        number = record.index
        if self._starts[number] < 0 or self._state[number] in (_BUSY, _REFUSED):
            return frames
        return frames[:0] if self._state[number] == _READY else np.arange(record.num_frames)

    def _load(self, decoder: Decoder, record: VideoRecord, start: int) -> bool:
        """Decode a whole record into its place; False if that is not possible, or is being done by somebody else."""
        number = record.index
        if self._state[number] != _EMPTY:
            return False
        self._state[number] = _BUSY  # if two begin at once, both write the same bytes
        step = _frame_bytes(record.height, record.width)
        whole = np.zeros((record.num_frames, 6), np.int64)
        whole[:, 0] = np.arange(record.num_frames)
        whole[:, 3:5] = record.width, record.height
        whole[:, 5] = whole[:, 0] * step
        size = record.num_frames * step
        good = False
        if self._buffer.claim(start, size):
            try:
                fill(decoder, record, whole, self._memory[start : start + size])
                good = True
            except (DecodeError, ShardError):
                good = False  # the clips that do not need its damaged part still work
        self._state[number] = _READY if good else _REFUSED
        return good

    def close(self) -> None:
        """Give the memory back."""
        self._buffer.close()
        self._memory = self._state = np.empty(0, np.uint8)


def _frame_bytes(height: int, width: int) -> int:
    return height * width * 3 // 2


def _places(index: ShardIndex, budget_bytes: int) -> tuple[np.ndarray, int]:
    """((N,) int64 where each record's frames begin, -1 for those left out; size of it all without the states)."""
    area = index.column("height").astype(np.int64) * index.column("width")
    sizes = index.column("num_frames").astype(np.int64) * (area * 3 // 2)
    order = np.argsort(fold_array(index.column("uid"), "cache"), kind="stable")
    extents = -(-sizes[order] // _PAGE) * _PAGE
    ends = np.cumsum(extents)
    count = int(np.searchsorted(ends, budget_bytes, "right"))
    starts = np.full(len(index), -1, np.int64)
    first = -(-len(index) // _PAGE) * _PAGE
    starts[order[:count]] = first + ends[:count] - extents[:count]
    starts[sizes == 0] = -1
    return starts, first + (int(ends[count - 1]) if count else 0) - len(index)


def _check_memory(budget_bytes: int) -> None:
    """Refuse a cache that this machine cannot hold."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return  # not Linux: the system will say
    free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    if budget_bytes > free:
        raise ValueError(
            f"a cache of {budget_bytes / _GIB:.1f} GiB does not fit into the {free / _GIB:.1f} GiB of free memory; "
            "lower cache_gb"
        )
