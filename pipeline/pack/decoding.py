"""One decoder, listened to: FFmpeg reports damage as an error, as a mark on a frame, in its log, or not at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import av
import av.logging
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from clipmill.pipeline.pack.probe import raise_if_memory
from clipmill.pipeline.pack.verify import rows

# these mark damaged frames as such; others fill gaps with what is in their memory and say nothing, unless told to fail
_SAY_ERRORS = ("h264",)
# these only log it, with this level and text: FFV1 then takes a slice from the frame before, MPEG-2 leaves a block as
# it finds it in its memory
_LOG_ERRORS = {
    "ffv1": (av.logging.ERROR, ""),
    "mpeg1video": (av.logging.DEBUG, "out of boundary"),
    "mpeg2video": (av.logging.DEBUG, "out of boundary"),
}
# these do not even log it: where a packet is missing, FFV1 may stop within a later frame and leave the rest as it is
_SILENT = ("ffv1",)
_PAINT = b"\x5a"
_KEPT = 4  # frames that the second decoder cannot use as memory for others


class Decoder:
    """Decodes the packets of a video stream in one thread. ``context``: the stream's own."""

    def __init__(self, context: VideoCodecContext) -> None:
        context.thread_count = 1  # several threads report errors late, and the workers use the cores
        if context.name not in _SAY_ERRORS:
            context.options = {"err_detect": "explode"}
        self._context = context
        self._level, self._text = _LOG_ERRORS.get(context.name, (None, ""))
        self._twin = _Twin(context) if context.name in _SILENT else None

    def decode(self, packet: Packet | None) -> tuple[list[VideoFrame], bool]:
        """Frames, and whether one of them is damaged though none says so. Raises what FFmpeg does."""
        if self._level is None:
            return self._context.decode(packet), False
        try:
            with _log(self._level) as lines:
                frames = self._context.decode(packet)
        finally:
            others = None if self._twin is None else self._twin.decode(packet)
        damaged = any(line[0] <= self._level and self._text in line[2] for line in lines)
        return frames, damaged or (others is not None and not _equal(frames, others))


@contextmanager
def _log(level: int) -> Iterator[list[Any]]:
    """What FFmpeg logs in this thread up to a level, as (level, name, text)."""
    before, skipped = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_skip_repeated(False)
    av.logging.set_level(level)
    try:
        with av.logging.Capture() as lines:
            yield lines
    finally:
        av.logging.set_level(before)
        av.logging.set_skip_repeated(skipped)


class _Twin:
    """A second decoder that writes to other memory: frames that depend on what was there before come out different.

    A decoder reuses the memory of frames that nobody holds; this one's are held for longer, and then painted over.
    """

    def __init__(self, context: VideoCodecContext) -> None:
        self._context = cast(VideoCodecContext, VideoCodecContext.create(context.name, "r"))
        self._context.thread_count = 1
        self._context.extradata = context.extradata
        self._context.width, self._context.height = context.width, context.height
        self._context.options = context.options
        self._held: deque[VideoFrame] = deque()

    def decode(self, packet: Packet | None) -> list[VideoFrame]:
        """Its frames; none where it fails."""
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError as error:
            raise_if_memory(error)
            return []
        while len(self._held) > _KEPT:
            for plane in self._held.popleft().planes:
                plane.update(_PAINT * plane.buffer_size)
        self._held.extend(frames)
        return frames


def _equal(frames: list[VideoFrame], others: list[VideoFrame]) -> bool:
    """Whether all pixels are."""
    return len(frames) == len(others) and all(
        np.array_equal(a, b)
        for frame, other in zip(frames, others, strict=True)
        for a, b in zip(_pixels(frame), _pixels(other), strict=True)
    )


def _pixels(frame: VideoFrame) -> list[np.ndarray]:
    """(H, bytes) of each plane, without what lies between the rows."""
    form = frame.format
    bits = max(one.bits for one in form.components) if form.is_planar else form.padded_bits_per_pixel
    widths = [plane.width * ((bits + 7) // 8) for plane in frame.planes]
    return [rows(plane, width) for plane, width in zip(frame.planes, widths, strict=True)]
