"""The default decoder: libavcodec through PyAV, from the packet table, without a container."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext

from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Emit, Planes
from clipmill.pipeline.record import CodecConfig, VideoRecord
from clipmill.pipeline.shard import ShardReader

_MAX_CONTEXTS = 16
_GAP_PACKETS = 32  # wanted groups closer than this are read as one range


def new(reader: ShardReader) -> Decoder:
    """The backend's constructor."""
    return PyavDecoder(reader)


class PyavDecoder:
    """Persistent codec contexts, one per configuration, flushed between groups of pictures."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._contexts: OrderedDict[tuple[CodecConfig, int, int], VideoCodecContext] = OrderedDict()
        self.read_s = 0.0
        self.decoded = 0

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        if frames[0] < 0 or frames[-1] >= record.num_frames:
            raise DecodeError(f"{record.key!r}: frames {frames[0]}..{frames[-1]} of {record.num_frames}")
        context = self._context(record)
        runs = _runs(record, frames)
        for first, stop, groups in _merged(runs):
            start_s = time.perf_counter()
            packets = self._reader.packets(record, first, stop)
            self.read_s += time.perf_counter() - start_s
            for group_first, group_stop, wanted in groups:
                try:
                    missing = self._group(context, record, packets, first, group_first, group_stop, wanted, emit)
                except (av.FFmpegError, ValueError) as error:
                    self._contexts.clear()
                    raise DecodeError(f"{record.shard}: {record.key!r} does not decode ({error})") from error
                if missing:
                    raise DecodeError(f"{record.shard}: {record.key!r} gave no frame {sorted(missing)[0]}")

    def _group(
        self,
        context: VideoCodecContext,
        record: VideoRecord,
        packets: list[memoryview],
        base: int,
        first: int,
        stop: int,
        wanted: set[int],
        emit: Emit,
    ) -> set[int]:
        """Decode packets [first, stop) from a key frame on; returns the wanted frames that did not appear."""
        context.flush_buffers()
        presentation = record.presentation
        reordered = len(presentation) > 0
        for number in range(first, stop):
            packet = av.Packet(cast(bytes, packets[number - base]))  # any buffer will do
            packet.pts = int(presentation[number]) if reordered else number
            for frame in context.decode(packet):
                self.decoded += 1
                if frame.pts in wanted:
                    wanted.discard(frame.pts)
                    emit(frame.pts, planes(frame, record))
        if wanted:
            for frame in context.decode(None):
                self.decoded += 1
                if frame.pts in wanted:
                    wanted.discard(frame.pts)
                    emit(frame.pts, planes(frame, record))
        return wanted

    def _context(self, record: VideoRecord) -> VideoCodecContext:
        key = (record.codec, record.height, record.width)
        context = self._contexts.get(key)
        if context is None:
            context = cast(VideoCodecContext, VideoCodecContext.create(record.codec.codec, "r"))
            context.thread_count = 1
            if record.codec.extradata:
                context.extradata = record.codec.extradata
            context.open()
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


def _runs(record: VideoRecord, frames: Sequence[int]) -> Iterator[tuple[int, int, set[int]]]:
    """Packet ranges [first, stop) that start at a key frame and hold the wanted frames of their group(s)."""
    keyframes = record.keyframes
    if len(record.presentation):  # frames leave the decoder in another order: map frame number -> packet number
        packet_of = np.argsort(record.presentation, kind="stable")
        starts_at = record.presentation[keyframes]
        wanted = np.asarray(frames)
        groups = np.searchsorted(starts_at, wanted, "right") - 1
        for group in np.unique(groups).tolist():
            members = wanted[groups == group]
            stop = int(packet_of[members].max()) + 1
            yield int(keyframes[group]), stop, set(members.tolist())
        return
    position, total = 0, len(frames)
    while position < total:
        group = int(np.searchsorted(keyframes, frames[position], "right")) - 1
        if group < 0:
            raise DecodeError(f"{record.key!r}: frame {frames[position]} has no key frame before it")
        end = int(keyframes[group + 1]) if group + 1 < len(keyframes) else record.num_frames
        stop = position
        while stop < total and frames[stop] < end:
            stop += 1
        yield int(keyframes[group]), frames[stop - 1] + 1, set(frames[position:stop])
        position = stop


def _merged(
    runs: Iterator[tuple[int, int, set[int]]],
) -> Iterator[tuple[int, int, list[tuple[int, int, set[int]]]]]:
    """Join runs that touch into one decode run and neighbours into one read."""
    current: list[tuple[int, int, set[int]]] = []
    for first, stop, wanted in runs:
        if current and first == current[-1][1]:  # contiguous: decode on without a flush
            begin, _, before = current[-1]
            current[-1] = (begin, stop, before | wanted)
        elif current and first - current[-1][1] <= _GAP_PACKETS:
            current.append((first, stop, wanted))
        else:
            if current:
                yield current[0][0], current[-1][1], current
            current = [(first, stop, wanted)]
    if current:
        yield current[0][0], current[-1][1], current
