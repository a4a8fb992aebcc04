"""What is shown when: one clock for all streams, the frame rate of a source, and frames at constant rate.

Pure functions of timestamps; nothing here opens a file. Times are exact: fractions of seconds, or integer ticks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
Time = int | Fraction

_BACK_PER_S = 2  # decode times never step back; by more than this part of a second they have started again
_AHEAD_S = 10  # in formats that are cut and joined freely, a longer hole is a joint and not a pause
_DOUBT_S = 2  # the packet after a longer hole needs another one that agrees with it
_NEVER_S = 600  # no pause before a last frame is longer
_STANDARD_FPS = [Fraction(n, d) for n, d in [
    (24000, 1001), (24, 1), (25, 1), (30000, 1001), (30, 1), (48, 1), (50, 1), (60000, 1001), (60, 1), (120, 1),
]]  # fmt: skip
_MAX_FPS = 1000


class Clock:
    """One clock for the streams of a file whose timestamps start again in the middle (joined broadcasts).

    The first stream that jumps decides how far everything after the joint is moved, and the others are moved by the
    same amount when they reach it, so that sound and picture stay together. A jump counts once the next packet agrees
    with it; a single packet elsewhere in time has a damaged timestamp. joined: the format is one whose files are cut
    and joined at will; there a long hole is a joint as well, elsewhere it is a pause. per_s: units of time in a second;
    with a common multiple of the streams' clock rates all times are integers, which is much faster.
    """

    def __init__(self, joined: bool, per_s: int = 1) -> None:
        self._joined = joined
        self._per_s, self._doubtful = per_s, _DOUBT_S * per_s
        self._ahead, self._never = _AHEAD_S * per_s, _NEVER_S * per_s
        self._moves: list[Time] = [0]
        self._section: dict[int, int] = {}
        self._next: dict[int, Time] = {}
        self._doubt: dict[int, Time] = {}
        self.agreed = False

    def move(self, stream: int, time: Time | None, duration: Time) -> Time | None:
        """What to add to this packet's timestamps. time: its decode time, or presentation time without one.

        None: the time is doubted. If `agreed` is True after the stream's next call, that one's answer holds for both;
        otherwise the doubted timestamps must be ignored.
        """
        self.agreed = False
        section = self._section.get(stream, 0)
        if time is None:
            return self._moves[section]
        duration = min(duration, self._ahead)
        expected = self._next.get(stream, time + self._moves[section])
        jump = time + self._moves[section] - expected
        doubted = self._doubt.pop(stream, None)
        if jump > self._doubtful or jump * _BACK_PER_S < -self._per_s:
            if doubted is None or (doubted < 0) != (jump < 0):
                self._doubt[stream] = jump
                self._next[stream] = expected + duration
                return None
            self.agreed = True
            if jump < 0 or (self._joined and jump > self._ahead):
                section += 1
                self._section[stream] = section
                if section == len(self._moves):
                    self._moves.append(self._moves[-1] - jump)
        self._next[stream] = time + self._moves[section] + duration
        return self._moves[section]

    def settle(self, stream: int) -> Time | None:
        """As `move`, for a last packet that is still doubted: a pause before it is believed, a joint is not."""
        pause = 0 < self._doubt[stream] <= (self._ahead if self._joined else self._never)
        return self._moves[self.section(stream)] if pause else None

    def section(self, stream: int) -> int:
        """How many joints a stream has passed."""
        return self._section.get(stream, 0)

    @property
    def joints(self) -> int:
        """How often the timestamps started again."""
        return len(self._moves) - 1


@dataclass(frozen=True, slots=True)
class Rate:
    """fps: frames per second. tolerance_s: how late a frame may come and still be the one of its instant. constant:
    the frames lie on that grid one by one (within one tick of the time base)."""

    fps: Fraction
    tolerance_s: Fraction
    constant: bool


def frame_rate(ticks: np.ndarray, tick_s: Fraction, declared: Sequence[Fraction | None]) -> Rate:
    """The constant rate that shows each frame of a source once, as nearly as there is one.

    ticks: (N,) presentation times in units of tick_s, any order. declared: what the container says, best first.

    >>> frame_rate(np.array([0, 33, 67, 100, 133]), Fraction(1, 1000), [Fraction(30)])
    Rate(fps=Fraction(30, 1), tolerance_s=Fraction(1, 1000), constant=True)
    >>> frame_rate(np.array([0, 40, 80, 780, 820]), Fraction(1, 1000), [None]).fps  # a pause, then on at 25 Hz
    Fraction(25, 1)
    """
    # a rate guessed from rounded times (989/33) is meant to be the standard one beside it (30000/1001)
    said = [one for fps in declared if fps and 0 < fps <= _MAX_FPS for one in (_snapped(fps), fps)]
    times = np.unique(ticks)
    if len(times) < 2:
        fps = said[1] if said else Fraction(25)
        return Rate(fps, min(tick_s, 1 / (4 * fps)), True)
    steps = np.diff(times)
    mean = Fraction(len(steps), int(times[-1] - times[0])) / tick_s
    # times as exact multiples of a tick are within half a tick of the truth, on both ends of a comparison
    jitter: Rate | None = None
    for fps in [*said, _snapped(mean), mean.limit_denominator(1001) or mean]:
        late = _lateness(times, tick_s, fps)
        if late <= min(tick_s, 1 / (2 * fps)):
            return Rate(fps, min(tick_s, 1 / (4 * fps)), True)
        if late <= 1 / (4 * fps) and jitter is None:
            jitter = Rate(fps, late + tick_s / 100, False)
    if jitter is not None:
        return jitter
    usual = steps[steps <= 1.5 * np.median(steps)]  # leaves out pauses and dropped frames
    fps = _snapped(Fraction(len(usual), int(usual.sum())) / tick_s)
    return Rate(fps, min(tick_s, 1 / (4 * fps)), False)


def _snapped(fps: Fraction) -> Fraction:
    nearest = min(_STANDARD_FPS, key=lambda one: abs(one - fps))
    if abs(nearest - fps) <= fps / 200:
        return nearest
    return min(fps.limit_denominator(1001) or fps, Fraction(_MAX_FPS))


def _lateness(times: np.ndarray, tick_s: Fraction, fps: Fraction) -> Fraction:
    """The largest distance of any frame from its place on a grid that starts with the first frame, in seconds."""
    ideal = np.arange(len(times)) * float(1 / (fps * tick_s))
    ticks = np.abs(times - times[0] - ideal).max()
    return Fraction(max(float(ticks) - 1e-6, 0)) * tick_s


class Cadence(Generic[T]):
    """Frames at instants k / fps, k = 0, 1, ...: for each the frame that is shown then.

    Feed frames in presentation order with `push`, then call `finish` with the time the last one stops being shown; if
    that is after 0, there is at least one instant.
    limit_s: no instants from there on. Attributes: count (instants so far), repeated and dropped (frames).

    >>> cadence = Cadence(Fraction(10), Fraction(0))
    >>> [*cadence.push(Fraction(0), "a"), *cadence.push(Fraction(1, 4), "b"), *cadence.finish(Fraction(1, 2))]
    ['a', 'a', 'a', 'b', 'b']
    """

    def __init__(self, fps: Fraction, tolerance_s: Fraction, limit_s: Fraction | None = None) -> None:
        self._fps = fps
        self._tolerance_s = tolerance_s
        self._limit = None if limit_s is None else frames_until(limit_s, fps)
        self._held: T | None = None
        self._shown = 0
        self.count = 0
        self.repeated = 0
        self.dropped = 0

    @property
    def full(self) -> bool:
        """No further instant can be asked for."""
        return self._limit is not None and self.count >= self._limit

    def push(self, time_s: Fraction, item: T) -> Iterator[T]:
        """Frames of the instants before this one takes over."""
        if self._held is not None:
            yield from self._emit(math.ceil((time_s - self._tolerance_s) * self._fps))
            if self._shown == 0 and time_s > self._tolerance_s and not self.full:
                self.dropped += 1
        self._held = item
        self._shown = 0

    def finish(self, end_s: Fraction, margin_s: Fraction | None = None) -> Iterator[T]:
        """Frames of the remaining instants, but for those less than ``margin_s`` (a quarter frame) before the end."""
        if self._held is not None:
            yield from self._emit(max(frames_until(end_s, self._fps, margin_s), end_s > 0))
            self.dropped += self._shown == 0 and not self.full

    def _emit(self, stop: int) -> Iterator[T]:
        assert self._held is not None
        if self._limit is not None:
            stop = min(stop, self._limit)
        while self.count < stop:
            self.count += 1
            self._shown += 1
            self.repeated += self._shown > 1
            yield self._held


def frames_until(end_s: Fraction, fps: Fraction, margin_s: Fraction | None = None) -> int:
    """Number of instants k / fps that lie at least ``margin_s`` (a quarter of a frame) before ``end_s``."""
    margin_s = 1 / (4 * fps) if margin_s is None else margin_s
    return max(math.ceil((end_s - margin_s) * fps), 0)
