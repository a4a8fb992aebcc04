"""The reference decoder: libavcodec through PyAV, from the packet table, without a container."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.video.codeccontext import VideoCodecContext

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Emit, Planes, UnsupportedCodecError
from clipmill.pipeline.decode.runs import Feed, Run, runs
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

_MAX_CONTEXTS = 16


def new(reader: Reader) -> Decoder:
    """The backend's constructor."""
    return PyavDecoder(reader)


class PyavDecoder:
    """Persistent codec contexts, one per configuration, flushed between groups of pictures."""

    def __init__(self, reader: Reader) -> None:
        self._feed = Feed(reader)
        self._contexts: OrderedDict[tuple[CodecConfig, int, int], VideoCodecContext] = OrderedDict()
        self.decoded = 0

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._feed.read_s

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        if frames[0] < 0 or frames[-1] >= record.num_frames:
            where = f"{record.shard}: {record.key!r}"
            raise DecodeError(f"{where}: frames {frames[0]}..{frames[-1]} of {record.num_frames}")
        context = self._context(record)
        for run, packets in self._feed.packets(record, runs(record, frames)):
            try:
                missing = self._run(context, record, run, packets, emit)
            except (av.FFmpegError, ValueError) as error:
                self._contexts.clear()
                raise DecodeError(f"{record.shard}: {record.key!r} does not decode ({error})") from error
            if missing:
                raise DecodeError(f"{record.shard}: {record.key!r} gave no frame {min(missing)}")

    def _run(
        self, context: VideoCodecContext, record: VideoRecord, run: Run, packets: list[memoryview], emit: Emit
    ) -> set[int]:
        """Decode from a key packet on; returns the wanted frames that did not appear."""
        context.flush_buffers()
        wanted = set(run.wanted)
        for number, data in zip(run.numbers(record).tolist(), packets, strict=True):
            packet = av.Packet(cast(bytes, data))  # any buffer will do
            packet.pts = number
            self._take(context.decode(packet), record, wanted, emit)
        if wanted:  # frames that leave the decoder late
            self._take(context.decode(None), record, wanted, emit)
        return wanted

    def _take(self, frames: list[av.VideoFrame], record: VideoRecord, wanted: set[int], emit: Emit) -> None:
        for frame in frames:
            self.decoded += 1
            if frame.pts in wanted:
                wanted.discard(frame.pts)
                emit(frame.pts, planes(frame, record))

    def _context(self, record: VideoRecord) -> VideoCodecContext:
        key = (record.codec, record.height, record.width)
        context = self._contexts.get(key)
        if context is None:
            try:
                context = cast(VideoCodecContext, VideoCodecContext.create(record.codec.codec, "r"))
            except UnknownCodecError as error:
                raise UnsupportedCodecError(
                    f"{record.shard}: {record.key!r} is {record.codec.codec}, which FFmpeg does not decode; "
                    "choose decoder 'auto'"
                ) from error
            context.thread_count = 1
            if record.codec.extradata:
                context.extradata = record.codec.extradata
            try:
                context.open()
            except (av.FFmpegError, ValueError) as error:
                raise DecodeError(
                    f"{record.shard}: {record.key!r} has a damaged codec configuration ({error})"
                ) from error
            if len(self._contexts) >= _MAX_CONTEXTS:
                self._contexts.popitem(last=False)
            self._contexts[key] = context
        else:
            self._contexts.move_to_end(key)
        return context


def planes(frame: av.VideoFrame, record: VideoRecord) -> Planes:
    """The three planes of a decoded frame without copying; other pixel formats are converted to 8-bit 4:2:0."""
    if frame.width != record.width or frame.height != record.height:
        raise DecodeError(
            f"{record.key!r} decodes to {frame.width}x{frame.height}, packed {record.width}x{record.height}"
        )
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        frame = frame.reformat(format="yuv420p")
    height, width = frame.height, frame.width
    y, u, v = frame.planes
    return (
        _plane(y)[:height, :width],
        _plane(u)[: height // 2, : width // 2],
        _plane(v)[: height // 2, : width // 2],
    )


def _plane(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
