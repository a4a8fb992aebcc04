"""The first pass over a source: packets on one clock, and what they tell about the video without decoding it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from math import lcm

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from clipmill.pipeline.pack.probe import Media, raise_if_memory
from clipmill.pipeline.pack.timeline import Clock, Rate, Time, frame_rate

_KINDS = ("video", "audio")
_JOINED = ("mpegts", "mpeg", "mpegvideo", "rm", "ogg")  # formats that are cut and joined at any byte
_DURATION_KNOWN = ("matroska,webm", "flv", "asf")  # formats whose header says how long the file is
_REORDER_S = 60  # no frame is stored that long before it is shown
_BLAMED = 4  # packets before a joint that may be called corrupt without being it
NO_TIME = -(1 << 62)


class Walk:
    """Packets of the chosen streams on one clock. Two walks over the same file see the same times.

    Attributes after the walk: cut (the error the container ended in, or empty), joints (see `Clock`), end_s (latest
    end of any packet of any stream).
    """

    def __init__(self, container: InputContainer, streams: Sequence[Stream]) -> None:
        self._container = container
        self._chosen = {stream.index for stream in streams}
        ticks_s = [stream.time_base for stream in container.streams if stream.type in _KINDS and stream.time_base]
        self._per_s = lcm(*(tick_s.denominator for tick_s in ticks_s))
        self._ticks: dict[int, Time] = {}  # of each stream, in units of the clock
        self._end: Time = 0
        self.cut = ""
        self.joints = 0

    @property
    def end_s(self) -> Fraction:
        """Latest end of any packet so far, in seconds."""
        return Fraction(self._end) / self._per_s

    def __iter__(self) -> Iterator[Packet]:
        """Every packet with its times moved onto the clock, and at the end an empty one per stream."""
        clock = Clock(joined=self._container.format.name in _JOINED, per_s=self._per_s)
        held: dict[int, list[Packet]] = {}
        doubted: dict[int, Packet] = {}
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets)
            except (StopIteration, IndexError):  # PyAV ends so where streams turned up on the way
                break
            except av.FFmpegError as error:
                raise_if_memory(error)
                self.cut = error.strerror
                break
            number = packet.stream_index
            if not packet.size:
                continue
            if number not in self._ticks:
                self._ticks[number] = self._tick(packet)
            tick = self._ticks[number]
            if tick < 0:
                continue
            section = clock.section(number)
            move = clock.move(number, _time(packet, tick), (packet.duration or 0) * tick)
            before = doubted.pop(number, None)
            if before is not None:
                self._set_times(before, move if clock.agreed else None)
            if move is None:
                doubted[number] = packet
            else:
                self._set_times(packet, move)
            if number not in self._chosen:
                continue
            joint = clock.section(number) != section
            waiting = [*held.pop(number, []), packet]
            if joint:  # the container counts its own packets, misses some here, and blames those just before
                for one in waiting:
                    one.is_corrupt = False
            blamed = any(one.is_corrupt for one in waiting) and len(waiting) <= _BLAMED and not joint
            if move is None or blamed:
                held[number] = waiting
            else:
                yield from waiting
        for number, one in doubted.items():
            self._set_times(one, clock.settle(number))
        for waiting in held.values():
            yield from waiting
        self.joints = clock.joints

    def _tick(self, packet: Packet) -> Time:
        """One tick of a packet's stream in units of the clock; 0 without a time base, -1 if it is not to be walked."""
        if packet.stream.type not in _KINDS:
            return -1
        ticks = (packet.time_base or Fraction(0)) * self._per_s
        return ticks.numerator if ticks.denominator == 1 else ticks

    def _set_times(self, packet: Packet, move: Time | None) -> None:
        """Move a packet's times; None = forget them."""
        tick = self._ticks[packet.stream_index]
        time = _time(packet, tick)
        if move is None or time is None:
            packet.pts = packet.dts = None
            return
        if packet.pts is not None and abs(packet.pts * tick - time) > _REORDER_S * self._per_s:
            packet.pts = None
        ticks = round(Fraction(move) / tick) if move else 0
        packet.pts, packet.dts = _moved(packet.pts, ticks), _moved(packet.dts, ticks)
        self._end = max(self._end, time + move + (packet.duration or 0) * tick)


def _time(packet: Packet, tick: Time) -> Time | None:
    time = packet.dts if packet.dts is not None else packet.pts
    return None if time is None or not tick else time * tick


def _moved(time: int | None, ticks: int) -> int | None:
    return None if time is None or abs(time + ticks) > -NO_TIME else time + ticks


class Times(Enum):
    """Where the time of a frame comes from.

    STAMPS: its presentation timestamp. ORDER: the decode timestamps, in the order in which frames leave the decoder,
    where most packets have no other; always for AVI, where FFmpeg makes up wrong ones if there are B-frames. COUNT:
    the number of frames before it, where timestamps are of no use because many frames share one.
    """

    STAMPS = "timestamps"
    ORDER = "decode order"
    COUNT = "counted"

    def of(self, item: Packet | VideoFrame) -> int | None:
        """The timestamp to go by, of a packet or a frame."""
        if self is Times.STAMPS:
            return item.pts
        return item.dts if self is Times.ORDER else None


@dataclass(slots=True)
class Scan:
    """What a pass over the packets tells about the video stream, without decoding it.

    rate: from the presentation times. times: how frames get theirs, see `Times`. packets: their number. keyframes:
    (number, time) of those where decoding can start. first_s: time of the first picture. last_s: duration of the last
    one. stop_s: where to stop before the end. truncated: the reason, where the file ends before it should.
    early_last: packets are missing at the end, so a frame that only leaves the decoder there may be shown too early.
    """

    rate: Rate
    times: Times
    packets: int = 0
    keyframes: list[tuple[int, int]] = field(default_factory=list)
    first_s: Fraction = Fraction(0)
    last_s: Fraction = Fraction(0)
    stop_s: Fraction | None = None
    truncated: str = ""
    early_last: bool = False


class Scanner:
    """Collects a `Scan` packet by packet, in little memory."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        self._avi = container.format.name == "avi"
        self._ticks = {Times.STAMPS: array("q"), Times.ORDER: array("q")}
        self._keyframes: list[tuple[int, dict[Times, int | None]]] = []
        self.packets = 0
        self._shown = 0
        self._last_ticks = 0
        self._untimed = 0

    def add(self, packet: Packet) -> None:
        """Note one packet of the stream."""
        times = {kind: kind.of(packet) for kind in self._ticks}
        if packet.is_keyframe:
            self._keyframes.append((self.packets, times))
        self.packets += 1
        if packet.is_discard:
            return
        self._shown += 1
        self._untimed += packet.pts is None and not self._ticks[Times.STAMPS]
        for kind, time in times.items():
            if time is not None:
                self._ticks[kind].append(time)
        self._last_ticks = packet.duration or self._last_ticks

    def finish(self, media: Media, container: InputContainer, walk: Walk) -> Scan:
        """The facts, with the reason if the file ends before it should."""
        stream, tick = self._stream, self._stream.time_base or Fraction(1, 90000)
        stamped, ordered = (len(ticks) for ticks in self._ticks.values())
        kind = Times.ORDER if self._avi or (2 * stamped < self._shown <= 2 * ordered) else Times.STAMPS
        ticks = np.array(self._ticks[kind], np.int64)
        times = np.unique(ticks)
        ends_early = walk.cut or self._ends_early(media, container, walk.end_s)
        whole = len(times)
        if len(times) and kind is Times.STAMPS:
            decode_times = self._ticks[Times.ORDER] or ticks[:1]
            rates = [rate for rate in (stream.average_rate, stream.base_rate, stream.guessed_rate) if rate]
            usual = self._last_ticks or round(1 / (tick * max(rates, default=Fraction(25))))
            late_s = (container.duration or 0) / av.time_base - float(walk.end_s)
            knows = container.format.name in _DURATION_KNOWN and late_s > 0.5 * usual * tick
            if ends_early or knows or container.format.name in _JOINED:
                whole = _settled(times, decode_times[-1], usual, bool(ends_early) or knows)
        said = [stream.average_rate, stream.base_rate, stream.guessed_rate]
        if len(times) == 1 and self._last_ticks > 0:  # of a single frame the others are guesses
            said.insert(1, 1 / (self._last_ticks * tick))
        rate = frame_rate(times[:whole], tick, said)
        keyframes = [(number, NO_TIME if (time := t[kind]) is None else time) for number, t in self._keyframes]
        scan = Scan(rate, kind, self.packets, keyframes, truncated=ends_early)
        scan.early_last = bool(ends_early) or (self._avi and self.packets < stream.frames)
        if len(times):  # Matroska does not give times before 0: count back from the first that is given
            untimed = self._untimed if kind is Times.STAMPS else 0
            scan.first_s = int(times[0]) * tick - untimed / rate.fps
        scan.last_s = self._last_ticks * tick or 1 / rate.fps
        if len(ticks) - len(times) > max(2, 0.02 * len(times)):
            scan.times = Times.COUNT
        elif whole < len(times):
            scan.stop_s = int(times[whole - 1]) * tick + 1 / rate.fps
            scan.truncated = ends_early or f"of its last {len(times) - whole + 1} frames some are missing"
            scan.early_last = True
        return scan

    def _ends_early(self, media: Media, container: InputContainer, end_s: Fraction) -> str:
        entries = self._stream.index_entries
        if "mov" in container.format.name:
            beyond = sum(entry.pos + entry.size > media.size for entry in entries)
            return f"{beyond} of {len(entries)} packets lie beyond the end of the file" if beyond else ""
        if container.format.name == "avi":  # its duration is adapted to the file's size
            missing = self.packets < 0.95 * self._stream.frames - 1
            return f"{self.packets} of {self._stream.frames} packets" if missing else ""
        declared_s = (container.duration or 0) / av.time_base
        if container.format.name in _DURATION_KNOWN and float(end_s) < 0.95 * declared_s - 0.5:
            return f"ends at {float(end_s):.2f} s of {declared_s:.2f} s"
        return ""


def _settled(times: np.ndarray, last_decode_time: int, usual: int, suspected: bool) -> int:
    """How many of the first of the (N,) times have none missing between them.

    Frames are stored in another order than they are shown. So a file that is cut off lacks not only the last frames but
    also some between those that are there, and in their place an earlier frame would be shown. What would have come is
    decoded, and so shown, after the last decode time. Frames beyond that count only as long as one follows the other at
    the usual distance: that of the frames before, or ``usual`` if there is one frame only. Without a suspicion that the
    file is cut off this is done to evenly spaced frames only, because others may have a pause there.
    """
    whole = max(int(np.searchsorted(times, last_decode_time, "right")), 1)
    steps = np.diff(times[:whole])
    if not len(steps):
        steps = np.array([usual])
    if not suspected and np.ptp(steps) > max(2, 0.1 * steps.max()):
        return len(times)
    step = float(np.median(steps))
    while whole < len(times) and times[whole] - times[whole - 1] <= 1.5 * step:
        whole += 1
    return whole
