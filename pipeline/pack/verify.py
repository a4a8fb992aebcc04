"""Decoding what was written: the proof of a record before it enters a shard."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane

from clipmill.pipeline.pack.outcome import Rejected

LOSSLESS_DB = 100.0  # stands for an infinite PSNR
_LOWEST_DB = 12.0  # no encoder does worse on any frame; a wrong frame does


def planes(frame: VideoFrame) -> list[np.ndarray]:
    """Y, U and V of an 8-bit 4:2:0 frame without copying."""
    return [rows(plane, plane.width) for plane in frame.planes]


def rows(plane: VideoPlane, width: int) -> np.ndarray:
    """(H, width) the first bytes of each row of a plane of any frame, without copying."""
    height, line_size = plane.height, plane.line_size
    shown = np.ndarray((height, width), np.uint8, cast(Any, plane), strides=(abs(line_size), 1))
    return shown if line_size > 0 else shown[::-1]  # it may lie upside down in memory


def together(frame: VideoFrame) -> int:
    """How many frames of this size to decode, encode or compare in one go.

    Decoder, encoder and interpreter throw each other out of the processor's cache when they take turns with every
    frame; with all of them in it, packing takes a fifth less time.
    """
    return max(min((1 << 19) // (frame.width * frame.height), 32), 1)


def psnr_db(squared_error: float, samples: int) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit samples."""
    if squared_error == 0:
        return LOSSLESS_DB
    return min(10 * float(np.log10(255.0**2 * samples / squared_error)), LOSSLESS_DB)


class Check:
    """Decodes packets as they are written and compares every frame with the one that went into the encoder.

    Keeps only the frames that the encoder has not given back yet. Raises `Rejected` (reason ``verify``) for a frame
    that is missing, is one too many or does not resemble its original.
    """

    def __init__(self, decoder: str, extradata: bytes | None) -> None:
        self._context = cast(VideoCodecContext, VideoCodecContext.create(decoder, "r"))
        self._context.thread_count = 1
        if extradata:
            self._context.extradata = extradata
        self._expected: deque[VideoFrame] = deque()
        self._waiting: list[Packet | None] = []
        self._squared_error = 0
        self._samples = 0
        self.worst_db = LOSSLESS_DB
        self.frames = 0

    @property
    def mean_db(self) -> float:
        """PSNR over all samples of all frames so far."""
        return psnr_db(self._squared_error, max(self._samples, 1))

    def expect(self, frame: VideoFrame) -> None:
        """Announce the next frame that goes into the encoder."""
        self._expected.append(frame)

    def packet(self, payload: bytes, presentation: int) -> None:
        """Decode one packet as it will lie in the shard."""
        packet = Packet(payload)
        packet.pts = presentation
        self._waiting.append(packet)
        if not self._expected or len(self._waiting) >= together(self._expected[0]):
            self._compare()

    def finish(self) -> None:
        """Decode to the end; all announced frames must have come."""
        self._waiting.append(None)
        self._compare()
        if self._expected:
            raise Rejected("verify", f"{len(self._expected)} frames do not come back from the decoder")

    def _compare(self) -> None:
        try:
            frames = [frame for packet in self._waiting for frame in self._context.decode(packet)]
        except av.FFmpegError as error:
            raise Rejected("verify", f"what was written does not decode ({error.strerror})") from error
        self._waiting.clear()
        for frame in frames:
            if not self._expected or frame.pts != self.frames:
                raise Rejected("verify", f"frame {frame.pts} comes back where {self.frames} should")
            squared_error, samples = _squared_error(self._expected.popleft(), frame)
            self.frames += 1
            self._squared_error += squared_error
            self._samples += samples
            self.worst_db = min(self.worst_db, psnr_db(squared_error, samples))
            if self.worst_db < _LOWEST_DB:
                raise Rejected("verify", f"frame {frame.pts} comes back with {self.worst_db:.1f} dB")


def _squared_error(a: VideoFrame, b: VideoFrame) -> tuple[int, int]:
    if (a.width, a.height) != (b.width, b.height):
        raise Rejected("verify", f"a {a.width}x{a.height} frame comes back as {b.width}x{b.height}")
    total = samples = 0
    for one, two in zip(planes(a), planes(b), strict=True):
        difference = (np.maximum(one, two) - np.minimum(one, two)).ravel().astype(np.float64)
        total += int(np.einsum("i,i", difference, difference))  # exact: whole numbers below 2**53
        samples += difference.size
    return total, samples


@dataclass(frozen=True, slots=True)
class PacketTable:
    """Packets of a written file, as a demuxer finds them: first byte, (P,) sizes, CRCs and key packet numbers."""

    first: int
    sizes: np.ndarray
    crcs: np.ndarray
    keyframes: np.ndarray
    extradata: bytes


def read_table(path: str) -> PacketTable:
    """Read a written file back with a demuxer; packets must lie one after the other."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        packets = [(p.pos or 0, p.size, zlib.crc32(p), p.is_keyframe) for p in container.demux(stream) if p.size]
        extradata = bytes(stream.codec_context.extradata or b"")
    if not packets:
        raise Rejected("verify", "no packets come back")
    positions, sizes, crcs, keys = (np.array(column, np.int64) for column in zip(*packets, strict=True))
    if (positions[:-1] + sizes[:-1] != positions[1:]).any():
        raise Rejected("verify", "the packets do not lie one after the other")
    u32 = np.uint32
    return PacketTable(
        int(positions[0]), sizes.astype(u32), crcs.astype(u32), np.flatnonzero(keys).astype(u32), extradata
    )
