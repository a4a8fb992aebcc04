"""Decoding a source to pictures on a clock, and from there to canonical frames at a constant rate."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from clipmill.pipeline.pack.convert import Canvas, Converter, Look, deinterlacer
from clipmill.pipeline.pack.decoding import Decoder
from clipmill.pipeline.pack.outcome import Rejected
from clipmill.pipeline.pack.probe import raise_if_memory
from clipmill.pipeline.pack.scan import NO_TIME, Scan, Times, Walk
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.timeline import Cadence

_MAX_S = 48 * 3600  # longer than any real recording: a broken clock


class DamagedError(Exception):
    """A picture inside the wanted part is damaged: find the longest part without damage first."""


@dataclass(frozen=True, slots=True)
class Window:
    """The part to keep, in seconds on the container's clock; None = from the first picture, to the end."""

    start_s: Fraction | None = None
    end_s: Fraction | None = None


@dataclass(slots=True)
class Shown:
    """One decoded frame. time_s: on the container's clock. damaged: it, or one it is predicted from, is not what was
    encoded; then frame may be None."""

    time_s: Fraction
    frame: VideoFrame | None
    damaged: bool = False


@dataclass(slots=True)
class Notes:
    """What normalisation did, for the record's JSON."""

    origin_s: Fraction | None = None
    frames_in: int = 0
    times_s: array = field(default_factory=lambda: array("d"))
    sizes: list[list[int]] = field(default_factory=list)
    deinterlaced: bool = False
    looks: list[Look] = field(default_factory=list)
    skipped_head: int = 0
    errors: int = 0
    disordered: int = 0
    cadence: Cadence | None = None


class Pictures:
    """Frames of a stream in presentation order; damaged ones are marked, as are all that may be predicted from them.

    from_s: frames before this time (on the container's clock) are not wanted; as far as key frames allow they are not
    decoded either.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, scan: Scan, notes: Notes, from_s: Fraction | None = None
    ) -> None:
        self._decoder = Decoder(stream.codec_context)
        self._walk = Walk(container, [stream])
        self._times = scan.times
        self._early_last = scan.early_last and scan.times is not Times.STAMPS
        counted = scan.times is Times.COUNT
        self._tick = 1 / scan.rate.fps if counted else stream.time_base or Fraction(1, 90000)
        self._usual = 1 if counted else max(round(1 / (scan.rate.fps * self._tick)), 1)
        self._begin = round(scan.first_s / self._tick)  # where frames without a time begin
        self._first_packet = _first_packet(scan, None if from_s is None or counted else from_s / self._tick)
        self._delay: int | None = None
        self._last = NO_TIME
        self._spoilt: int | None = None  # time of damage that no key frame after it has ended yet
        self._notes = notes
        notes.skipped_head = scan.keyframes[0][0] if scan.keyframes else 0

    def __iter__(self) -> Iterator[Shown]:
        """Decode."""
        for number, packet in enumerate(self._walk):
            if number < self._first_packet:
                continue
            if self._times is Times.ORDER and number == self._first_packet:
                self._begin = packet.dts or 0
            damaged = packet.is_corrupt
            try:
                frames, unmarked = self._decoder.decode(packet)
                if unmarked:
                    damaged |= self._spoilt is None  # otherwise it may be what came of the damage before
                    time = self._times.of(packet)
                    self._spoil(self._next_time if time is None else time)
                yield from self._arrange(frames)
            except av.FFmpegError as error:
                raise_if_memory(error)
                damaged = True
            if damaged:
                yield self._damage(self._times.of(packet))
        try:
            held, unmarked = self._decoder.decode(None)
            if unmarked:
                self._spoil(self._next_time)
            yield from self._arrange([] if self._early_last else held)
        except av.FFmpegError as error:
            raise_if_memory(error)
            yield self._damage(None)

    def _arrange(self, frames: list[VideoFrame]) -> Iterator[Shown]:
        for frame in frames:
            time = self._times.of(frame)
            if time is None:
                time = self._next_time
            elif self._times is Times.ORDER:  # the first frame out belongs to the first packet in
                self._delay = time - self._begin if self._delay is None else self._delay
                time -= self._delay
            if frame.is_corrupt:
                self._notes.errors += 1
                self._spoil(time)
            elif self._spoilt is not None and frame.key_frame and time > self._spoilt:
                self._spoilt = None
            if time <= self._last:  # two frames at one time: the first one is shown
                self._notes.disordered += 1
                continue
            self._last = time
            frame.time_base = self._tick
            yield Shown(time * self._tick, frame, self._spoilt is not None)

    def _damage(self, time: int | None) -> Shown:
        self._notes.errors += 1
        time = self._next_time if time is None else max(time, self._next_time)
        self._spoil(time)
        return Shown(time * self._tick, None, damaged=True)

    @property
    def _next_time(self) -> int:
        return self._begin if self._last == NO_TIME else self._last + self._usual

    def _spoil(self, time: int) -> None:
        self._spoilt = time if self._spoilt is None else max(time, self._spoilt)


def _first_packet(scan: Scan, from_ticks: Fraction | None) -> int:
    """The packet to start decoding at: two key frames before, because pictures shown just before a key frame may
    follow it in the file and need what came earlier."""
    before = [n for n, ticks in scan.keyframes if from_ticks is not None and NO_TIME < ticks <= from_ticks]
    if len(before) >= 3:
        return before[-3]
    return scan.keyframes[0][0] if scan.keyframes else 0


def progressive(shown: Iterator[Shown], notes: Notes) -> Iterator[Shown]:
    """Deinterlace from the first frame on that is marked as interlaced; frames before it pass untouched."""
    graph: tuple[Any, Any, Any] | None = None
    kind: tuple | None = None
    waiting: deque[Shown] = deque()
    for one in shown:
        frame = one.frame
        if frame is None:
            yield one
            continue
        if graph is not None and kind != (frame.width, frame.height, frame.format.name):
            yield from _drain(graph, waiting)
            graph = None
        if graph is None and (frame.interlaced_frame or notes.deinterlaced):
            graph = deinterlacer(frame)
            kind = (frame.width, frame.height, frame.format.name)
            notes.deinterlaced = True
        if graph is None:
            yield one
            continue
        waiting.append(one)
        graph[1].push(frame)
        yield from _pull(graph, waiting)
    if graph is not None:
        yield from _drain(graph, waiting)


def _pull(graph: tuple[Any, Any, Any], waiting: deque[Shown]) -> Iterator[Shown]:
    while True:
        try:
            frame = graph[2].pull()
        except (BlockingIOError, EOFError):
            return
        one = waiting.popleft()
        yield Shown(one.time_s, frame, one.damaged)


def _drain(graph: tuple[Any, Any, Any], waiting: deque[Shown]) -> Iterator[Shown]:
    graph[1].push(None)
    yield from _pull(graph, waiting)
    assert not waiting


class Normaliser:
    """Canonical frames of one source. Attributes: notes; canvas, matrix and full_range from the first frame on."""

    def __init__(self, stream: VideoStream, scan: Scan, settings: PackSettings, window: Window) -> None:
        self._stream = stream
        self._scan = scan
        self._settings = settings
        self._window = window
        self.fps = settings.fps or scan.rate.fps
        self.notes = Notes()
        self.canvas: Canvas | None = None
        self.matrix = "bt709"
        self.full_range = False
        self._converter: Converter | None = None
        self._last: tuple[VideoFrame, VideoFrame] | None = None

    def frames(self, container: InputContainer) -> Iterator[VideoFrame]:
        """The frames at instants 0, 1 / fps, ... of the window; raises DamagedError at the first damaged one."""
        notes, start_s, end_s = self.notes, self._window.start_s, self._window.end_s
        tolerance_s = min(self._scan.rate.tolerance_s, 1 / (4 * self.fps))
        cadence: Cadence[tuple[VideoFrame, Look]] | None = None
        time_s, lost = Fraction(0), False
        for one in progressive(iter(Pictures(container, self._stream, self._scan, notes, start_s)), notes):
            if cadence is None:
                start_s = notes.origin_s = one.time_s if start_s is None else start_s
                cadence = Cadence(self.fps, tolerance_s, None if end_s is None else end_s - start_s)
                notes.cadence = cadence
            assert start_s is not None
            time_s = one.time_s - start_s
            outside = end_s is not None and one.time_s >= end_s
            if one.damaged or one.frame is None:  # a lost frame may be reported before those that come before it
                if time_s >= 0 and not outside:
                    raise DamagedError
                lost |= time_s < 0
                continue
            if outside or cadence.full:
                break
            if lost and time_s > tolerance_s:
                raise DamagedError  # of all things the frame that is shown at instant 0
            lost = False
            if time_s > _MAX_S:
                raise Rejected("too_large", f"a frame at {float(time_s):.0f} s, {_MAX_S} s is the longest")
            look = Look.of(one.frame, self._stream.sample_aspect_ratio)
            self._note(time_s, look)
            for item in cadence.push(time_s, (one.frame, look)):
                yield self._convert(item)
        if cadence is not None and start_s is not None:
            last_s = min(self._scan.last_s, max(Fraction(1), 10 / self.fps))
            stop_s = time_s + last_s if end_s is None else min(time_s + last_s, end_s - start_s)
            for item in cadence.finish(stop_s, min(last_s, 1 / self.fps) / 4):
                yield self._convert(item)

    def _note(self, time_s: Fraction, look: Look) -> None:
        notes = self.notes
        notes.frames_in += 1
        notes.times_s.append(round(float(time_s), 6))
        if not notes.looks or look != notes.looks[-1]:
            notes.looks.append(look)
            if [look.width, look.height] != (notes.sizes[-1][1:] if notes.sizes else None):
                notes.sizes.append([notes.frames_in - 1, look.width, look.height])

    def _convert(self, item: tuple[VideoFrame, Look]) -> VideoFrame:
        frame, look = item
        if self._converter is None:
            self.canvas = Canvas.of(look, self._settings.short_side)
            self.matrix, self.full_range = self._form(look)
            self._converter = Converter(self.canvas, self.matrix, self.full_range)
        if self._last is None or self._last[0] is not frame:  # a frame shown twice is converted once
            self._last = frame, self._converter(frame, look)
        return self._last[1]

    def _form(self, look: Look) -> tuple[str, bool]:
        """Matrix and range of what comes out."""
        if self._settings.profile == "jpeg":
            return "bt601", True  # JFIF knows no other
        if self._settings.profile == "copy":
            return look.matrix or "bt709", look.full_range
        return (look.matrix if self._settings.matrix == "source" and look.matrix else "bt709"), False


def longest_run(pictures: Iterable[Shown], notes: Notes, interval_s: Fraction, window: Window) -> tuple[Window, int]:
    """The longest stretch of undamaged frames inside a window, and the number of errors before the last such frame."""
    best, start_s, stop_s = Window(Fraction(0), Fraction(0)), None, Fraction(0)
    errors = 0

    def close() -> None:
        nonlocal best, start_s
        if start_s is not None and stop_s - start_s > (best.end_s or 0) - (best.start_s or 0):
            best = Window(start_s, stop_s)
        start_s = None

    for one in pictures:
        if window.start_s is not None and one.time_s < window.start_s:
            continue
        if window.end_s is not None and one.time_s >= window.end_s:
            continue
        if one.damaged or one.frame is None:
            close()
            continue
        errors = notes.errors
        start_s = one.time_s if start_s is None else start_s
        stop_s = one.time_s + interval_s
    close()
    return best, errors
