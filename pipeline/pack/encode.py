"""Canonical frames to an encoded file, checked frame by frame while it is written.

A `Profile` says how; to add one that ends in packets of an mp4 is to add an entry to `PROFILES`.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import cast

import av
import numpy as np
from av.container import OutputContainer
from av.error import ExternalError
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.pack.convert import Canvas, h273
from clipmill.pipeline.pack.outcome import Picture, Rejected
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.verify import LOSSLESS_DB, Check, planes, read_table, together

_TIMELESS = Fraction(1, 25)  # the encoder counts frames; equal parameter sets at all rates let decoders be shared
_GPU_SIDE = 64  # x265 corrupts memory with smaller pictures (seen at 64x48)
_START_CODE = re.compile(rb"\x00*\x00\x00\x01")


@dataclass(frozen=True, slots=True)
class Profile:
    """encoder, decoder: FFmpeg's names. options: encoder options from settings. Encoders whose packets have start codes
    (ITU-T H.265, annex B) get them replaced by lengths, as in any mp4."""

    encoder: str
    decoder: str
    options: Callable[[PackSettings], dict[str, str]]


def _x264(settings: PackSettings) -> dict[str, str]:
    gop = settings.gop
    return {
        "preset": "veryfast",
        "tune": "fastdecode",
        "crf": str(settings.quality),
        "flags": "+bitexact",
        "a53cc": "0",
        "udu_sei": "0",
        # annexb=0: packets in the form of an mp4. cpu-independent: otherwise the result depends on the processor, and
        # with AVX-512 even on chance (core 165 reads memory it never wrote in its macroblock tree)
        "x264-params": f"annexb=0:threads=1:cpu-independent=1:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0"
        ":bframes=0:ref=1",
    }


def _x265(settings: PackSettings) -> dict[str, str]:
    gop = settings.gop
    return {
        "preset": "superfast",
        "crf": str(settings.quality),
        "flags": "+bitexact",
        "udu_sei": "0",
        "x265-params": f"pools=none:frame-threads=1:wpp=0:info=0:log-level=none:keyint={gop}:min-keyint={gop}"
        ":scenecut=0:open-gop=0:bframes=0:ref=1",
    }


def _mjpeg(settings: PackSettings) -> dict[str, str]:
    """Quantiser 4 has the PSNR of x264's 20; it doubles as the step of H.264 does, every 6."""
    quantiser = str(min(max(round(4 * 2 ** ((settings.quality - 20) / 6)), 2), 31))
    # the transform of this name is the only one without a version for each instruction set
    return {"qmin": quantiser, "qmax": quantiser, "dct": "int", "flags": "+bitexact"}


PROFILES = {
    "cpu": Profile("libx264", "h264", _x264),
    "intra": Profile("libx264", "h264", _x264),
    "gpu": Profile("libx265", "hevc", _x265),
    "jpeg": Profile("mjpeg", "mjpeg", _mjpeg),
}


class Mp4Writer:
    """Writes one video-only mp4."""

    def __init__(self, path: str, settings: PackSettings, canvas: Canvas, fps: Fraction, matrix: str) -> None:
        self._path = path
        self._canvas = canvas
        self._fps = fps
        self._matrix = matrix
        self._full_range = settings.full_range
        self._profile = PROFILES[settings.profile]
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - ours, because FFmpeg's own may hide a full disk
        options = {"fflags": "+bitexact"}
        self._container = cast(OutputContainer, av.open(self._file, "w", format="mp4", options=options))
        options = self._profile.options(settings)
        self._stream = cast(
            VideoStream, self._container.add_stream(self._profile.encoder, rate=1 / _TIMELESS, options=options)
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = (
            canvas.width,
            canvas.height,
            ("yuvj420p" if settings.full_range else "yuv420p"),
        )
        self._tick = self._stream.time_base = 1 / fps
        context = self._stream.codec_context
        context.thread_count = 1
        context.color_range = 2 if settings.full_range else 1
        context.colorspace = context.color_primaries = h273(matrix)
        context.color_trc = h273("bt709")  # the same curve for all three
        self._check: Check | None = None
        self._config = b""
        self._prefix = False
        self._crcs: list[int] = []
        self._count = 0

    def write(self, frame: VideoFrame) -> None:
        """Encode the next frame."""
        frame.pts, frame.time_base, frame.duration = self._count, _TIMELESS, 1
        frame.pict_type = PictureType.NONE  # otherwise the encoder repeats the key frames of the source
        self._count += 1
        try:
            packets = self._stream.encode(frame)
        except ExternalError as error:
            if self._count > 1:
                raise
            # all that x264 and x265 say when they cannot have their memory
            raise MemoryError(f"the encoder of {frame.width}x{frame.height} pixels cannot start") from error
        if self._check is None:
            self._config = bytes(self._stream.codec_context.extradata or b"")
            if self._config.startswith((b"\0\0\1", b"\0\0\0\1")):
                self._container.start_encoding()  # so that the stream knows its parameters
                self._prefix, self._config = True, _mp4_config(self._stream)
            self._check = Check(self._profile.decoder, self._config)
        self._check.expect(frame)
        self._mux(packets)

    def close(self) -> Picture:
        """Finish the file, read it back and return what it holds."""
        self._mux(self._stream.encode(None))
        self.abandon()
        check = self._check
        assert check is not None
        check.finish()
        if check.frames != self._count:
            raise Rejected("verify", f"{self._count} frames went in, {check.frames} come back")
        table = read_table(self._path)
        if table.crcs.tolist() != self._crcs or table.extradata != self._config:
            raise Rejected("verify", "the file holds other packets than the encoder made")
        return Picture(
            path=self._path,
            suffix=".mp4",
            codec=CodecConfig(
                codec=self._profile.decoder,
                extradata=self._config,
                matrix=self._matrix,
                full_range=self._full_range,
            ),
            num_frames=self._count,
            fps=self._fps,
            height=self._canvas.height,
            width=self._canvas.width,
            first_packet=table.first,
            sizes=table.sizes,
            crcs=table.crcs,
            presentation=np.empty(0, np.uint32),
            keyframes=table.keyframes,
            psnr_db=check.mean_db,
            psnr_min_db=check.worst_db,
        )

    def abandon(self) -> None:
        """Close the file."""
        try:
            self._container.close()
        finally:
            self._file.close()

    def _mux(self, packets: list[Packet]) -> None:
        for packet in packets:
            payload = bytes(packet)
            if self._prefix:
                payload = _with_lengths(payload)
            self._crcs.append(zlib.crc32(payload))
            assert self._check is not None
            assert packet.pts is not None
            self._check.packet(payload, packet.pts)
            packet.time_base = self._tick
            packet.duration = 1
            self._container.mux(packet)


def _mp4_config(stream: VideoStream) -> bytes:
    """The parameter sets of an encoder as an mp4 holds them (hvcC, ISO/IEC 14496-15): the muxer makes it."""
    out = io.BytesIO()
    with cast(OutputContainer, av.open(out, "w", format="mp4", options={"movflags": "empty_moov"})) as container:
        container.add_stream_from_template(stream)
        container.start_encoding()
    out.seek(0)
    with av.open(out, format="mp4") as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


def _with_lengths(payload: bytes) -> bytes:
    """A packet whose units follow start codes as one whose units follow their length in four bytes."""
    units = _START_CODE.split(payload)[1:]
    return b"".join(part for unit in units for part in (len(unit).to_bytes(4, "big"), unit))


class RawWriter:
    """Writes I420 frames one after the other: nothing to open, nothing to decode, and large."""

    def __init__(self, path: str, canvas: Canvas, fps: Fraction, matrix: str) -> None:
        self._path = path
        self._canvas = canvas
        self._fps = fps
        self._matrix = matrix
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `abandon`
        self._crcs: list[int] = []

    def write(self, frame: VideoFrame) -> None:
        """Append a frame."""
        data = b"".join(plane.tobytes() for plane in planes(frame))
        assert len(data) == self._frame_bytes
        self._crcs.append(zlib.crc32(data))
        written = 0
        while written < len(data):  # on a full disk a part may fit
            written += self._file.write(data[written:]) or 0

    def close(self) -> Picture:
        """Read the file back and return what it holds."""
        self.abandon()
        count, size = len(self._crcs), self._frame_bytes
        with open(self._path, "rb") as file:
            found = [zlib.crc32(data) for data in iter(lambda: file.read(size), b"")]
        if found != self._crcs:
            raise Rejected("verify", "the file holds other frames than were written")
        return Picture(
            path=self._path,
            suffix=".yuv",
            codec=CodecConfig(codec="raw", matrix=self._matrix),
            num_frames=count,
            fps=self._fps,
            height=self._canvas.height,
            width=self._canvas.width,
            first_packet=0,
            sizes=np.full(count, size, np.uint32),
            crcs=np.array(self._crcs, np.uint32),
            presentation=np.empty(0, np.uint32),
            keyframes=np.arange(count, dtype=np.uint32),
            psnr_db=LOSSLESS_DB,
            psnr_min_db=LOSSLESS_DB,
        )

    def abandon(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def _frame_bytes(self) -> int:
        return self._canvas.width * self._canvas.height * 3 // 2


def _groups(frames: Iterator[VideoFrame]) -> Iterator[list[VideoFrame]]:
    """As many frames as `together` says at a time."""
    for frame in frames:
        yield [frame, *islice(frames, together(frame) - 1)]


def encode(
    frames: Iterator[VideoFrame],
    path: str,
    settings: PackSettings,
    canvas: Callable[[], tuple[Canvas, str]],
    fps: Fraction,
) -> Picture:
    """Encode all frames to ``path``. canvas: their size and matrix, asked for after the first frame came."""
    writer: Mp4Writer | RawWriter | None = None
    try:
        for group in _groups(frames):
            if writer is None:
                width, height = canvas()[0].width, canvas()[0].height
                if settings.profile == "gpu" and min(width, height) < _GPU_SIDE:
                    raise Rejected("too_small", f"{width}x{height} pixels, profile gpu needs {_GPU_SIDE} on each side")
                if settings.profile == "raw":
                    writer = RawWriter(path, canvas()[0], fps, canvas()[1])
                else:
                    writer = Mp4Writer(path, settings, canvas()[0], fps, canvas()[1])
            for frame in group:
                writer.write(frame)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    if writer is None:
        raise Rejected("no_frames", "no picture in it decodes")
    return writer.close()
