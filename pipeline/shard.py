"""Shards: plain WebDataset tars whose bytes are also addressed by the index.

A sample is up to three members with one stem: ``STEM.mp4`` (or ``.jpg``, ``.yuv``), ``STEM.wav`` and ``STEM.json``.
Anyone can read a shard with any tar reader; clipmill reads byte ranges and checks the CRC of every packet it uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import tarfile
import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, final

import numpy as np

from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.record import VideoRecord, read_at

_TAR_BLOCK = 512
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_\-]+\.[A-Za-z0-9.]+")
_MAX_OPEN_FILES = 64  # per thread
_LARGE_BYTES = 1 << 24
_FAR = 1 << 62  # no file is that long, and a little more is no file offset


class ShardError(ValueError):
    """A shard that is missing, truncated or altered."""


class ShardWriter:
    """Write one tar with fixed metadata, so that equal content gives equal bytes.

    The file appears under its final name only by `close`, complete and flushed; leaving the block by an exception
    removes the unfinished file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, payload: bytes) -> int:
        """Append a member and return the byte offset of its payload in the shard."""
        info = _member(name, len(payload))
        return self._append(info, io.BytesIO(payload))

    def add_file(self, name: str, path: Path) -> int:
        """As `add`, with the bytes of a file that need not fit into memory."""
        info = _member(name, path.stat().st_size)
        with path.open("rb") as file:
            return self._append(info, file)

    def _append(self, info: tarfile.TarInfo, file: IO[bytes]) -> int:
        self._tar.addfile(info, file)
        return self._tar.offset - -(-info.size // _TAR_BLOCK) * _TAR_BLOCK

    def close(self) -> None:
        """Finish the tar, flush it to the disk and give it its final name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # after `close` there is nothing of this left
            with contextlib.suppress(OSError):  # what it still buffers may not fit on the disk
                self._file.close()
            self._partial.unlink(missing_ok=True)


def _member(name: str, size: int) -> tarfile.TarInfo:
    if not _MEMBER_NAME.fullmatch(name):
        raise ValueError(f"member name {name!r} must be plain letters, digits, '-' and '_' with an extension")
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


class Reader(ABC):
    """Reads byte ranges of shards, and what the index says lies in them. Safe to share between threads.

    Attribute ``waste``: see `clipmill.pipeline.decode.runs.reads`.
    """

    waste: float

    @abstractmethod
    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``; ShardError if the shard is missing or ends before."""

    @abstractmethod
    def descriptor(self, shard: str) -> int:
        """A file with the bytes of a shard in their places, for reading by this thread and no other.

        Bytes that are not at hand may be missing from it or be zero: checksums tell. Raises ShardError if there is
        no such shard.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back; no thread may be reading."""

    @final
    def packets(self, record: VideoRecord, first: int, stop: int) -> list[memoryview]:
        """The encoded packets [first, stop) of a record, read as one range, each verified."""
        sizes = record.packet_sizes
        offset = record.packet_offset + int(sizes[:first].sum(dtype=np.int64))
        ends = np.cumsum(sizes[first:stop], dtype=np.int64).tolist()
        view = memoryview(self.read(record.shard, offset, ends[-1] if ends else 0))
        crcs = record.packet_crcs[first:stop].tolist()
        result, start = [], 0
        for number, (end, crc) in enumerate(zip(ends, crcs, strict=True), first):
            packet = view[start:end]
            if zlib.crc32(packet) != crc:
                raise ShardError(f"{record.shard}: packet {number} of {record.key!r} is altered (checksum differs)")
            result.append(packet)
            start = end
        return result

    @final
    def samples(self, record: VideoRecord, start: int, count: int) -> np.ndarray:
        """int16 samples [start, start + count) of the audio track; zeros outside it. Shape (count,)."""
        wave = np.zeros(count, np.int16)
        low, high = max(start, 0), min(start + count, record.num_samples)
        if low >= high:
            return wave
        first, stop = sound_blocks(record, start, count)
        begin, end = first * AUDIO_BLOCK, min(stop * AUDIO_BLOCK, record.num_samples)
        data = memoryview(self.read(record.shard, record.audio_offset + 2 * begin, 2 * (end - begin)))
        crcs = audio_crcs(data)
        if crcs != record.audio_crcs[first:stop].tolist():
            raise ShardError(f"{record.shard}: the sound of {record.key!r} is altered (checksum differs)")
        wave[low - start : high - start] = np.frombuffer(data, "<i2")[low - begin : high - begin]
        return wave


@final
class ShardReader(Reader):
    """Positional reads from shards on disk. Keeps a bounded number of files open per thread."""

    waste = math.inf

    def __init__(self) -> None:
        self._local = threading.local()
        self._caches: list[OrderedDict[str, int]] = []
        self._lock = threading.Lock()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``; ShardError if the file is missing or ends before."""
        if (size > _LARGE_BYTES or offset > _FAR) and offset + size > os.fstat(self.descriptor(shard)).st_size:
            raise _truncated(shard, offset + size)  # before so much memory is asked for on the word of a damaged index
        data = read_at(self.descriptor(shard), offset, size)
        if len(data) != size:
            raise _truncated(shard, offset + size)
        return data

    def close(self) -> None:
        """Close all files; no thread may be reading."""
        with self._lock:
            for files in self._caches:
                while files:
                    os.close(files.popitem()[1])

    def descriptor(self, shard: str) -> int:
        """The open file of a shard, for reading by this thread and no other; ShardError if it cannot be opened."""
        files: OrderedDict[str, int] | None = getattr(self._local, "files", None)
        if files is None:  # a cache per thread: nobody else can close a file that is being read
            files = self._local.files = OrderedDict()
            with self._lock:
                self._caches.append(files)
        handle = files.get(shard)
        if handle is not None:
            files.move_to_end(shard)
            return handle
        try:
            handle = os.open(shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ShardError(f"{shard}: cannot be opened ({error.strerror}); restore it or pack again") from error
        if len(files) >= _MAX_OPEN_FILES:
            os.close(files.popitem(last=False)[1])
        files[shard] = handle
        return handle


def _truncated(shard: str, end: int) -> ShardError:
    return ShardError(f"{shard}: ends before byte {end}; the shard is truncated, pack it again")


def sound_blocks(record: VideoRecord, start: int, count: int) -> tuple[int, int]:
    """Blocks [first, stop) of the sound that hold samples [start, start + count); none where there are no samples."""
    low, high = max(start, 0), min(start + count, record.num_samples)
    return (low // AUDIO_BLOCK, -(-high // AUDIO_BLOCK)) if low < high else (0, 0)


def audio_crcs(pcm: bytes | memoryview) -> list[int]:
    """CRC-32 of every block of `AUDIO_BLOCK` int16 samples."""
    step = 2 * AUDIO_BLOCK
    return [zlib.crc32(pcm[start : start + step]) for start in range(0, len(pcm), step)]


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, payload offset, size) of every regular member of a tar; names that could leave a folder are an error."""
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg() or not _MEMBER_NAME.fullmatch(info.name):
                    raise ShardError(f"{path}: member {info.name!r} is not one that clipmill writes")
                yield info.name, info.offset_data, info.size
    except (tarfile.TarError, OSError, EOFError, UnicodeError) as error:
        raise ShardError(f"{path}: not a readable tar ({error})") from error


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
