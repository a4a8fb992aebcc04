"""A bounded cache on the local disk of what was read from object storage.

One sparse file per record holds the bytes at their places in the shard. What a file holds is not written down
anywhere: packets and blocks of sound whose checksum is right are there, others are not. So nothing can be left half
done by a process that is killed, and two processes may fetch the same clip at once.

When the budget is used up, records with the largest uid (a hash) leave, and none comes in above those that stay. So in
the long run the cache holds a fixed random part of the records, and a share of budget / size of the data set is read
from it in every epoch. Epochs have orders of their own: with a cache of half the data set that gives 50 % hits, where
to evict what was used longest ago would give 15 %.
"""

from __future__ import annotations

import fcntl
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.storage import StorageError

_PAGE = 4096
_SPARE = 64  # an eviction frees 1 / _SPARE of the budget, so that not every entry needs one


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Packets or blocks of sound that follow each other in a shard: place of the first byte, sizes and CRC-32."""

    offset: int
    sizes: np.ndarray
    crcs: np.ndarray

    @property
    def size(self) -> int:
        """Bytes of it all."""
        return int(self.sizes.sum(dtype=np.int64))


class ShardCache:
    """The cache in ``folder``, shared by all threads and processes that open it with the same budget."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._turn = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / "size", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        with self._locked():  # counted anew: a process may have been killed before it wrote the size
            found = (entry for bucket in self._buckets() for entry in os.scandir(folder / bucket))
            size = sum(_disk_bytes(entry.stat()) for entry in found)
            self._set_size(self._evicted("", size, budget_bytes) if size > budget_bytes else size)

    @property
    def size(self) -> int:
        """Bytes on the disk, as the processes have counted them."""
        return int.from_bytes(os.pread(self._file, 8, 0), "little")

    def get(self, record: VideoRecord, extent: Extent) -> tuple[bytearray, list[tuple[int, int]]]:
        """The bytes of an extent, and the ranges [start, stop) of them that are missing."""
        data = bytearray(extent.size)
        try:
            file = os.open(self._path(record), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return data, [(0, len(data))] if data else []
        try:
            os.preadv(file, [data], extent.offset - _base(record))
        finally:
            os.close(file)
        view = memoryview(data)
        missing: list[tuple[int, int]] = []
        start = 0
        for size, crc in zip(extent.sizes.tolist(), extent.crcs.tolist(), strict=True):
            stop = start + size
            if zlib.crc32(view[start:stop]) != crc:
                if missing and missing[-1][1] == start:
                    missing[-1] = (missing[-1][0], stop)
                else:
                    missing.append((start, stop))
            start = stop
        return data, missing

    def put(self, record: VideoRecord, parts: Sequence[tuple[int, bytes]]) -> None:
        """Keep bytes of a record, given as (offset in the shard, bytes), if it ranks among those that fit."""
        most = sum(len(data) + 2 * _PAGE for _, data in parts)
        path, base = self._path(record), _base(record)
        with self._locked():
            size = self.size
            if size + most > self._budget_bytes:
                room = min(self._budget_bytes - most, self._budget_bytes - self._budget_bytes // _SPARE)
                size = self._evicted(path.name, size, room)
                self._set_size(size)
                if size + most > self._budget_bytes:
                    return
            try:
                path.parent.mkdir(exist_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
                try:
                    before = _disk_bytes(os.fstat(file))
                    for offset, data in parts:
                        os.pwrite(file, data, offset - base)
                    self._set_size(size + _disk_bytes(os.fstat(file)) - before)
                finally:
                    os.close(file)
            except OSError as error:
                remedy = "lower --shard-cache-gb or choose another --cache-dir"
                raise StorageError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error

    def close(self) -> None:
        """Leave the cache to others; no thread may be using it."""
        os.close(self._file)

    def _path(self, record: VideoRecord) -> Path:
        name = f"{record.uid:016x}"
        return self._folder / name[:2] / name

    def _buckets(self) -> list[str]:
        """Folders of files, by the first two digits of their names, in order."""
        return sorted(entry.name for entry in os.scandir(self._folder) if entry.is_dir())

    def _evicted(self, above: str, size: int, room: int) -> int:
        """Remove files from the last name down, none up to ``above``, until ``room`` is kept; returns the new size."""
        for bucket in reversed(self._buckets()):
            if bucket < above[:2]:
                break
            folder = self._folder / bucket
            for name in sorted(os.listdir(folder), reverse=True):
                if size <= room or name <= above:
                    return size
                size -= _disk_bytes((folder / name).stat())
                (folder / name).unlink()
            folder.rmdir()
        return size

    def _set_size(self, size: int) -> None:
        os.pwrite(self._file, size.to_bytes(8, "little"), 0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among threads and processes; the lock of a process that is killed is free."""
        with self._turn:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _base(record: VideoRecord) -> int:
    """The byte of the shard where the record's file begins."""
    begins = [record.packet_offset] * (record.num_frames > 0) + [record.audio_offset] * (record.num_samples > 0)
    return min(begins)


def _disk_bytes(stat: os.stat_result) -> int:
    return stat.st_blocks * 512
