"""Packets of a record as a small mp4 in memory, for decoders that only take containers.

Only the packets that are needed are read, verified and wrapped, so such a decoder opens a file of a few kilobytes whose
key frames are exactly where decoding must start, instead of seeking in the original one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from clipmill.pipeline.record import VideoRecord

_ENTRIES = {
    "h264": (b"avc1", b"avcC"),
    "hevc": (b"hvc1", b"hvcC"),
    "libdav1d": (b"av01", b"av1C"),
    "mjpeg": (b"jpeg", b""),
}
_CODES = {"bt709": 1, "bt601": 6, "bt2020": 9}  # matrix and primaries, ISO/IEC 23091-2 (H.273)
_CURVE = 1  # transfer characteristics of BT.709
FPS = 25
_UNITY = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_LANGUAGE = 0x55C4  # undetermined

CODECS = tuple(_ENTRIES)
"""Codecs that `wrap` can put into an mp4, as FFmpeg names their decoders."""


def wrap(record: VideoRecord, packets: Sequence[bytes | memoryview], pts: np.ndarray, keys: Sequence[int]) -> bytes:
    """An mp4 that holds ``packets`` in this order, at `FPS` frames per second.

    pts: (P,) place of each packet's frame in the order of display, a permutation of 0 .. P - 1. keys: numbers of the
    packets where decoding can start. The sample description names the record's colour matrix and range.
    """
    first, config = _parameter_sets(record)
    if first:
        starts = set(keys)
        packets = [first + bytes(packet) if i in starts else packet for i, packet in enumerate(packets)]
    count, late = len(packets), delay(pts)
    offsets = (pts + late - np.arange(count)).tolist()
    sizes = [len(packet) for packet in packets]
    tables = [
        _full(b"stsd", 0, 0, struct.pack(">I", 1), _entry(record, config)),
        _full(b"stts", 0, 0, struct.pack(">3I", 1, count, 1)),
        _full(b"stss", 0, 0, struct.pack(f">{len(keys) + 1}I", len(keys), *(key + 1 for key in keys))),
        _full(b"stsc", 0, 0, struct.pack(">4I", 1, 1, count, 1)),
        _full(b"stsz", 0, 0, struct.pack(f">{count + 2}I", 0, count, *sizes)),
    ]
    if late:
        runs = b"".join(struct.pack(">2I", 1, offset) for offset in offsets)
        tables.append(_full(b"ctts", 0, 0, struct.pack(">I", count), runs))
    head = _box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2mp41")
    moov_size = len(_moov(record, count, tables, 0))
    moov = _moov(record, count, tables, len(head) + moov_size + 8)
    return b"".join([head, moov, struct.pack(">I4s", 8 + sum(sizes), b"mdat"), *packets])


def delay(pts: np.ndarray) -> int:
    """Frames by which `wrap` shows all frames later, so that none is shown before it is decoded."""
    return int((np.arange(len(pts)) - pts).max())


def _parameter_sets(record: VideoRecord) -> tuple[bytes, bytes]:
    """(bytes to put before every key packet, body of the configuration box) of a record's extradata."""
    extradata = record.codec.extradata
    if record.codec.codec in ("h264", "hevc") and extradata[:1] != b"\x01":  # start codes, as in a transport stream
        return extradata, b""
    return b"", extradata


def _moov(record: VideoRecord, count: int, tables: list[bytes], position: int) -> bytes:
    width, height = record.width, record.height
    stbl = _box(b"stbl", *tables, _full(b"stco", 0, 0, struct.pack(">2I", 1, position)))
    dinf = _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1)))
    minf = _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), dinf, stbl)
    mdhd = _full(b"mdhd", 0, 0, struct.pack(">4I2H", 0, 0, FPS, count, _LANGUAGE, 0))
    hdlr = _full(b"hdlr", 0, 0, bytes(4), b"vide", bytes(13))
    tkhd = _full(
        b"tkhd", 0, 3, struct.pack(">5I", 0, 0, 1, 0, count), bytes(16), _UNITY,
        struct.pack(">2I", width << 16, height << 16),
    )  # fmt: skip
    mvhd = _full(
        b"mvhd", 0, 0, struct.pack(">4IiH", 0, 0, FPS, count, 0x10000, 0x100), bytes(10), _UNITY, bytes(24),
        struct.pack(">I", 2),
    )  # fmt: skip
    return _box(b"moov", mvhd, _box(b"trak", tkhd, _box(b"mdia", mdhd, hdlr, minf)))


def _entry(record: VideoRecord, config: bytes) -> bytes:
    """The sample entry: codec, size, configuration and colours."""
    codec = record.codec
    kind, name = _ENTRIES[codec.codec]
    code = _CODES[codec.matrix]
    colours = struct.pack(">4s3HB", b"nclx", code, _CURVE, code, 0x80 if codec.full_range else 0)
    visual = struct.pack(">2H2IIHH", record.width, record.height, 0x480000, 0x480000, 0, 1, 0)
    visual += bytes(30) + struct.pack(">Hh", 0x18, -1)
    boxes = [_box(name, config)] if config else []
    return _box(kind, bytes(6), struct.pack(">H", 1), bytes(16), visual, *boxes, _box(b"colr", colours))


def _box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)
