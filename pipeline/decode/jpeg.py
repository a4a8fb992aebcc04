"""The jpeg backend: libjpeg-turbo straight to planes, at full or reduced size.

At full size it is as fast as ``libav``, and within 1 level of it: JPEG does not fix how its transform is rounded. It is
here for reduced sizes, which it decodes faster and which leave less to copy and to resize.

Of the bindings on PyPI none gives planes without a system library, so the few functions that are needed are called
through ctypes, in the library that the package ``turbojpeg`` brings or in the system's (any version from 1.5 on).
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Emit, Planes, UnsupportedCodecError, check
from clipmill.pipeline.decode.runs import Feed, Run
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

SCALES = (1, 2, 4, 8)
_PIX_FMTS = ("yuvj420p", "yuv420p")
_SUBSAMPLING_420 = 2
_MAX_BUFFERS = 8


def new(reader: Reader) -> Decoder:
    """The backend's constructor. Raises ModuleNotFoundError where there is no libjpeg-turbo."""
    if library() is None:
        raise ModuleNotFoundError("neither the package 'turbojpeg' nor a system's libturbojpeg is there")
    return JpegDecoder(reader)


class JpegDecoder:
    """One decompressor; its planes are reused from frame to frame."""

    def __init__(self, reader: Reader) -> None:
        self._feed = Feed(reader)
        self._decompressor = Decompressor()
        self.decoded = 0

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._feed.read_s

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit, scale: int = 1) -> None:
        """See `Decoder.decode`. scale: one of `SCALES`; planes are that many times smaller, rounded up."""
        check("jpeg", record, frames, ("mjpeg",))
        if record.codec.pix_fmt not in _PIX_FMTS or len(record.presentation):
            raise UnsupportedCodecError(
                f"{record.shard}: {record.key!r} is JPEG in {record.codec.pix_fmt}, decoder 'jpeg' takes 4:2:0 in "
                "order; choose decoder 'auto'"
            )
        for run, (packet,) in self._feed.packets(record, [Run(number, number + 1, (number,)) for number in frames]):
            try:
                planes = self._decompressor(packet, record.height, record.width, scale)
            except ValueError as error:
                raise DecodeError(f"{record.shard}: frame {run.first} of {record.key!r}: {error}") from error
            self.decoded += 1
            emit(run.first, planes)


class Decompressor:
    """Calls libjpeg-turbo. The planes it returns are valid until the next call."""

    def __init__(self) -> None:
        found = library()
        assert found is not None
        self._turbo = found
        self._handle = self._turbo.tjInitDecompress()
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    def __call__(self, packet: bytes | memoryview, height: int, width: int, scale: int = 1) -> Planes:
        """Y, U and V of a JPEG that must be 4:2:0 of this size; ValueError says what is wrong with it.

        Planes are ceil(side / scale) wide and high; U and V half of that, rounded up.
        """
        data = np.frombuffer(packet, np.uint8)
        found = np.zeros(4, np.int32)
        places = [found[place:].ctypes.data for place in range(4)]
        if self._turbo.tjDecompressHeader3(self._handle, data.ctypes.data, len(data), *places):
            raise ValueError(f"not a JPEG ({self._failure()})")
        if found[:3].tolist() != [width, height, _SUBSAMPLING_420]:  # also guards the planes against overflow
            raise ValueError(f"a JPEG of {found[0]}x{found[1]} pixels, not {width}x{height} in 4:2:0")
        rows, columns = -(-height // scale), -(-width // scale)
        into = self._into(rows, columns)
        memory = (into.addresses.ctypes.data, columns, into.strides.ctypes.data, rows)
        if self._turbo.tjDecompressToYUVPlanes(self._handle, data.ctypes.data, len(data), *memory, 0):
            raise ValueError(f"a damaged JPEG ({self._failure()})")
        return into.planes[0][:rows, :columns], into.planes[1], into.planes[2]

    def _into(self, rows: int, columns: int) -> _Buffers:
        held = self._buffers.get((rows, columns))
        if held is None:
            if len(self._buffers) >= _MAX_BUFFERS:
                self._buffers.pop(next(iter(self._buffers)))
            held = self._buffers[rows, columns] = _Buffers(rows, columns)
        return held

    def _failure(self) -> str:
        """What the library says. It starts anew: tables of a damaged picture would be used for the next one."""
        said = self._turbo.tjGetErrorStr2(self._handle).decode("utf-8", "replace")
        self._turbo.tjDestroy(self._handle)
        self._handle = self._turbo.tjInitDecompress()
        return said

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._turbo.tjDestroy(self._handle)


class _Buffers:
    """Planes of pictures of one size; the library fills whole blocks of 2 x 2 pixels."""

    def __init__(self, rows: int, columns: int) -> None:
        half = (-(-rows // 2), -(-columns // 2))
        shapes = ((2 * half[0], 2 * half[1]), half, half)
        y, u, v = (np.empty(shape, np.uint8) for shape in shapes)
        self.planes: Planes = (y, u, v)
        self.addresses = np.array([plane.ctypes.data for plane in self.planes], np.int64)
        self.strides = np.array([columns for _, columns in shapes], np.int32)


@lru_cache(maxsize=1)
def library() -> Any:
    """libjpeg-turbo's TurboJPEG library (a `ctypes.CDLL`), None if there is none."""
    for path in _candidates():
        try:
            turbo = ctypes.CDLL(path)
            pointer, size, integer = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
            turbo.tjInitDecompress.restype = pointer
            turbo.tjDestroy.argtypes = [pointer]
            turbo.tjGetErrorStr2.argtypes, turbo.tjGetErrorStr2.restype = [pointer], ctypes.c_char_p
            turbo.tjDecompressHeader3.argtypes = [pointer, pointer, size, *[pointer] * 4]
            plane_arguments = [pointer, integer, pointer, integer, integer]
            turbo.tjDecompressToYUVPlanes.argtypes = [pointer, pointer, size, *plane_arguments]
        except (OSError, AttributeError):  # another architecture, or too old
            continue
        return turbo
    return None


def _candidates() -> list[str]:
    wheel = find_spec("turbojpeg")
    found = []
    if wheel is not None and wheel.origin is not None:
        found = sorted(map(str, Path(wheel.origin).with_name("turbojpeg.libs").glob("libturbojpeg*")))
    system = ctypes.util.find_library("turbojpeg")
    return [*found, system] if system else found
