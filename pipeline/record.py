"""VideoRecord and ShardIndex: what is packed, where its bytes lie, and nothing that needs decoding to know.

The index is one Arrow IPC file (``index.arrow``) that is memory-mapped: opening costs the same for a thousand and for
a million records. Of a large one, the lists, which are nearly all of it, are read record by record instead, so that
memory stays small. Row i describes record i; its packet table is enough to read any clip as one byte range of the shard
and to decode it without opening a container.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipmill.pipeline.codec import CodecConfig

SCHEMA_VERSION = 1
INDEX_FILE = "index.arrow"
REMOTE_FILE = "remote.json"  # beside the index of a data set whose shards are elsewhere
_SHARD_NAME = re.compile(r"[\w\-][\w.\-]*")  # a path in an index could lead anywhere

_LIST_U32 = pa.large_list(pa.uint32())
FIELDS: list[tuple[str, pa.DataType]] = [
    ("uid", pa.uint64()),
    ("key", pa.large_string()),
    ("source", pa.large_string()),
    ("split", pa.large_string()),
    ("label", pa.int32()),
    ("shard", pa.uint32()),
    ("codec", pa.uint32()),
    ("num_frames", pa.uint32()),
    ("fps_num", pa.uint32()),
    ("fps_den", pa.uint32()),
    ("height", pa.uint32()),
    ("width", pa.uint32()),
    ("packet_offset", pa.uint64()),
    ("packet_sizes", _LIST_U32),
    ("packet_crcs", _LIST_U32),
    ("presentation", _LIST_U32),
    ("keyframes", _LIST_U32),
    ("audio_offset", pa.uint64()),
    ("num_samples", pa.uint64()),
    ("audio_hz", pa.uint32()),
    ("audio_crcs", _LIST_U32),
    ("silent", pa.uint8()),
    ("salvaged", pa.uint8()),
    ("digest", pa.binary(16)),
]
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in FIELDS])
LISTS = tuple(name for name, kind in FIELDS if kind == _LIST_U32)
_TEXTS = tuple(name for name, kind in FIELDS if not pa.types.is_integer(kind) and kind != _LIST_U32)
_PLAIN = tuple(name for name, kind in FIELDS if pa.types.is_integer(kind) and name not in
               ("shard", "codec", "fps_num", "fps_den", "silent", "salvaged"))  # fmt: skip
_MOSTLY_MAPPED = 64 << 20  # bytes of the largest index whose lists are mapped like the rest
_NOTHING = np.empty(0, np.uint32)


class IndexFormatError(ValueError):
    """An index file that is missing, damaged or of another schema version."""


def uid_of(key: str) -> int:
    """The stable 64-bit number of a sample, a hash of its key; label stores and masks are keyed by it."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class _LazyText:
    """Reads the texts of a record from the index when they are first asked for; few of its users ask."""

    __slots__ = ("_place",)

    def __getattr__(self, name: str) -> Any:
        if name not in _TEXTS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        batch, row = self._place
        value = batch.texts[name][row].as_py()
        object.__setattr__(self, name, value)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRecord(_LazyText):
    """One packed video, image or sound.

    index: row number. uid: stable sample number. key: name in the corpus. shard: path of the tar. codec: decoder
    configuration. num_frames: decodable frames (0 = sound only). fps: constant frame rate in Hz. height, width: in
    pixels. packet_offset: byte of the first packet in the shard; packets follow each other in decode order.
    packet_sizes, packet_crcs: (P,) uint32 bytes and CRC-32 of each packet. presentation: (P,) uint32, the frame
    number each packet decodes to, empty when it is its own number. keyframes: packet numbers where decoding can
    start. audio_offset: byte of sample 0 (time 0 of the video); num_samples: int16 mono samples, 0 = no sound;
    audio_hz: their rate. audio_crcs: CRC-32 of every `AUDIO_BLOCK` samples. silent: sound is present but digital
    silence. salvaged: only a part of the source could be read. label: class number, -1 = none.
    """

    index: int
    uid: int
    key: str
    shard: str
    codec: CodecConfig
    num_frames: int
    fps: Fraction
    height: int
    width: int
    packet_offset: int
    packet_sizes: np.ndarray
    packet_crcs: np.ndarray
    presentation: np.ndarray
    keyframes: np.ndarray
    audio_offset: int
    num_samples: int
    audio_hz: int
    audio_crcs: np.ndarray
    silent: bool
    salvaged: bool
    label: int
    split: str
    source: str
    digest: bytes

    @property
    def duration_s(self) -> float:
        """Length of the picture track in seconds; of the sound where there is no picture."""
        if self.num_frames:
            return float(self.num_frames / self.fps)
        return self.num_samples / self.audio_hz if self.audio_hz else 0.0


@lru_cache(maxsize=4096)
def _fraction(numerator: int, denominator: int) -> Fraction:
    return Fraction(numerator, max(denominator, 1))


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to ``size`` bytes from ``offset`` on, fewer only where the file ends."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # the kernel may return less than asked
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class _File:
    """An index file: mapped, and readable without that. Pages that are touched in a map count as memory of the process,
    and the system maps up to megabytes at a time; what is read from the file is freed with the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)  # with the last record that needs it
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self.buffer = pa.py_buffer(self._map)

    def holds(self, part: pa.Buffer) -> bool:
        """Whether a buffer is a part of the file. A damaged index may point anywhere."""
        first = part.address - self.buffer.address
        return part.size == 0 or 0 <= first <= first + part.size <= self.buffer.size

    def read(self, offset: int, count: int) -> np.ndarray:
        """(count,) uint32 from byte ``offset`` on."""
        data = read_at(self._descriptor, offset, 4 * count)
        if len(data) < 4 * count:
            raise IndexFormatError(f"{self.path}: was cut off while in use; run `clipmill verify {self.path.parent}`")
        return np.frombuffer(data, np.uint32)

    def forget(self) -> None:
        """Let go of the pages that were touched; they come back from the file when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Stored:
    """A column of numbers that is read from the file slice by slice; otherwise like the array."""

    def __init__(self, file: _File, values: pa.UInt32Array) -> None:
        self._file = file
        data = values.buffers()[1]
        self._start = (data.address - file.buffer.address if data else 0) + 4 * values.offset

    def __getitem__(self, part: slice) -> np.ndarray:
        count = part.stop - part.start
        return self._file.read(self._start + 4 * part.start, count) if count else _NOTHING


class _Batch:
    """Zero-copy numpy columns of one Arrow record batch; the lists of a large index are read when asked for."""

    def __init__(self, file: _File, batch: pa.RecordBatch) -> None:
        self.num_rows = batch.num_rows
        self.fixed: dict[str, np.ndarray] = {}
        self.lists: dict[str, tuple[np.ndarray, np.ndarray | _Stored]] = {}
        self.texts: dict[str, pa.Array] = {}
        large = file.buffer.size > _MOSTLY_MAPPED
        for name, kind in FIELDS:
            column = batch.column(name)
            if not all(buffer is None or file.holds(buffer) for buffer in column.buffers()):
                raise ValueError(f"column {name} is compressed or lies outside of the file")
            column.validate(full=name in _TEXTS)  # or a damaged offset of a text would be followed out of the file
            if name in LISTS:
                offsets = np.frombuffer(column.buffers()[1], np.int64, self.num_rows + 1, column.offset * 8)
                values = column.values
                if offsets[0] < 0 or offsets[-1] > len(values) or (np.diff(offsets) < 0).any():
                    raise ValueError(f"column {name} points outside its values")
                self.lists[name] = offsets, _Stored(file, values) if large else values.to_numpy(zero_copy_only=True)
            elif pa.types.is_integer(kind):
                self.fixed[name] = column.to_numpy(zero_copy_only=True)
            else:
                self.texts[name] = column


class ShardIndex:
    """The memory-mapped index of a packed data set, or a selection of its rows.

    Attributes: ``root`` (folder of the index), ``url`` (where the shards are, empty: in the folder), ``classes``.

    >>> ShardIndex.open("/nowhere")
    Traceback (most recent call last):
    clipmill.pipeline.record.IndexFormatError: /nowhere: no index.arrow there; is this a folder made by `clipmill pack`?
    """

    def __init__(self, root: Path, rows: np.ndarray | None = None) -> None:
        self.root = root
        path = root / INDEX_FILE
        if not path.is_file():
            raise IndexFormatError(f"{root}: no {INDEX_FILE} there; is this a folder made by `clipmill pack`?")
        try:
            file = _File(path)
            reader = pa.ipc.open_file(file.buffer)
            meta = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            version = int(meta.get("clipmill.schema_version", -1))
            if version != SCHEMA_VERSION:
                raise IndexFormatError(
                    f"{path}: schema version {version}, this clipmill reads {SCHEMA_VERSION}; pack the corpus again"
                )
            if not reader.schema.equals(SCHEMA, check_metadata=False):
                raise IndexFormatError(f"{path}: columns differ from schema version {SCHEMA_VERSION}; pack again")
            self._batches = [_Batch(file, reader.get_batch(i)) for i in range(reader.num_record_batches)]
            file.forget()
            self._shards: list[str] = json.loads(meta["clipmill.shards"])
            if strangers := [name for name in self._shards if not _SHARD_NAME.fullmatch(name)]:
                raise IndexFormatError(f"{path}: {strangers[0]!r} is no name of a shard in its folder; pack again")
            self.url = url_of(root)
            self._paths = [f"{self.url}/{name}" if self.url else str(root / name) for name in self._shards]
            self._codecs = [CodecConfig.from_json(item) for item in json.loads(meta["clipmill.codecs"])]
            self.classes: list[str] = json.loads(meta["clipmill.classes"])
        except (pa.ArrowException, OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, IndexFormatError):
                raise
            raise IndexFormatError(f"{path}: damaged index ({error}); run `clipmill verify {root}`") from error
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._file_digest = meta.get("clipmill.digest", "")
        self._rows = rows

    @staticmethod
    def open(root: str | Path) -> ShardIndex:
        """Open the data set in folder ``root`` or at a URL; raises IndexFormatError with the remedy.

        For a URL also what `clipmill.pipeline.remote.data_folder` raises.
        """
        if not is_url(root):
            return ShardIndex(Path(root))
        from clipmill.pipeline.remote import data_folder

        return ShardIndex(data_folder(root))

    def __reduce__(self) -> tuple:
        return ShardIndex, (self.root, self._rows)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @property
    def digest(self) -> str:
        """A short hex name of exactly these records; a selection has its own."""
        if self._rows is None:
            return self._file_digest
        return hashlib.blake2b(self._file_digest.encode() + self._rows.tobytes(), digest_size=8).hexdigest()

    @property
    def shards(self) -> list[Path]:
        """The shard files, in order; those of a remote data set are not there."""
        return [self.root / name for name in self._shards]

    def _locate(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = index if self._rows is None else int(self._rows[index])
        number = 0 if len(self._batches) == 1 else int(np.searchsorted(self._starts, row, "right")) - 1
        return self._batches[number], row - int(self._starts[number])

    def __getitem__(self, index: int) -> VideoRecord:
        batch, row = self._locate(index)
        fixed = batch.fixed
        shard, codec = fixed["shard"].item(row), fixed["codec"].item(row)
        if shard >= len(self._shards) or codec >= len(self._codecs):
            raise IndexFormatError(f"{self.root / INDEX_FILE}: record {index} names shard {shard}, codec {codec}")
        record = object.__new__(VideoRecord)  # without the texts, and in a third of the time of the constructor
        put = object.__setattr__
        put(record, "_place", (batch, row))
        put(record, "index", index)
        put(record, "shard", self._paths[shard])
        put(record, "codec", self._codecs[codec])
        put(record, "fps", _fraction(fixed["fps_num"].item(row), fixed["fps_den"].item(row)))
        put(record, "silent", fixed["silent"].item(row) != 0)
        put(record, "salvaged", fixed["salvaged"].item(row) != 0)
        for name in _PLAIN:
            put(record, name, fixed[name].item(row))
        for name, (offsets, values) in batch.lists.items():
            put(record, name, values[offsets.item(row) : offsets.item(row + 1)])
        return record

    def __iter__(self) -> Iterator[VideoRecord]:
        return (self[i] for i in range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """A whole column: integers as they lie in the file, strings as an object array, lists as their lengths."""
        parts: list[np.ndarray] = []
        for batch in self._batches:
            if name in batch.fixed:
                parts.append(batch.fixed[name])
            elif name in batch.lists:
                parts.append(np.diff(batch.lists[name][0]))
            else:
                parts.append(batch.texts[name].to_numpy(zero_copy_only=False))
        if not parts:
            return np.empty(0, np.int64)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if self._rows is None else whole[self._rows]

    def select(self, keep: np.ndarray) -> ShardIndex:
        """The records where a boolean mask holds, or the given record numbers in the given order."""
        keep = np.asarray(keep)
        rows = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
        return ShardIndex(self.root, rows if self._rows is None else self._rows[rows])

    def split(self, name: str) -> ShardIndex:
        """The records of one split; an unknown name lists those that exist."""
        names = self.column("split")
        mask = names == name
        if not mask.any():
            raise ValueError(f"{self.root}: no split {name!r}; it has {sorted(set(names.tolist()))}")
        return self.select(mask)


def is_url(text: str | Path) -> bool:
    """Whether a data set is named by a URL rather than by a folder.

    >>> is_url("s3://bucket/set"), is_url("/data/set")
    (True, False)
    """
    return "://" in str(text)


def url_of(root: Path) -> str:
    """Where the shards of a data set are, empty if they are in its folder."""
    path = root / REMOTE_FILE
    return str(json.loads(path.read_text("utf-8"))["url"]) if path.is_file() else ""
