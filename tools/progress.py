"""Progress with rate and remaining time: a bar on a terminal, a plain line now and then elsewhere.

Nothing appears in the first two seconds, so short work stays silent. Output goes to standard error; standard output
belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

QUIET_S = 2.0  # shorter work shows nothing
PLAIN_EVERY_S = 5.0  # between two plain lines
_RESUME_S = 1.0  # what the first call reports this early was done by an earlier run
_WINDOW_S = 30.0  # the remaining time follows the rate of the last half minute

T = TypeVar("T")


class Progress:
    """A context manager that is told how far the work is.

    what: the work, e.g. ``pack``. total: amount of it, None = unknown. unit: what is counted. quiet: show nothing
    (for ``--json``). Safe to call from several threads. The object itself is a callback ``(done, total, note)``;
    ``advance`` counts by itself. What the callback reports at once is taken as done by an earlier run.

    >>> with Progress("pack", 3, "files", quiet=True) as progress:
    ...     for _ in range(3):
    ...         progress.advance()
    >>> progress.done
    3
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "items",
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.done = 0
        self.note = ""
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._lock = threading.RLock()
        self._start_s = self._shown_s = clock()
        self._first = 0  # work that an earlier run did; not part of the rate
        self._recent: deque[tuple[float, int]] = deque()
        self._bar: Any = None
        self._printed: int | None = None  # done in the last plain line

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._lock:
            if self._bar is not None:
                self._draw()
                self._bar.stop()
                self._bar = None
            elif self._printed not in (None, self.done) and kind is None:
                self._print()

    def __call__(self, done: int, total: int | None = None, note: object = "") -> None:
        """Say how much is done; ``note`` is shown at the end of the line (a mapping as ``name number`` pairs)."""
        with self._lock:
            now_s = self._clock()
            if not self._recent:
                self._first = done if now_s - self._start_s < _RESUME_S else 0
                self._recent.append((self._start_s, self._first))
            self.done = done
            self.total = self.total if total is None else total
            self.note = _text(note)
            self._recent.append((now_s, done))
            while len(self._recent) > 2 and self._recent[1][0] < now_s - _WINDOW_S:
                self._recent.popleft()
            if not self.quiet:
                self._show(now_s)

    def advance(self, count: int = 1, note: object = "") -> None:
        """Say that ``count`` more are done."""
        with self._lock:
            if not self._recent:
                self._recent.append((self._start_s, self.done))
            self(self.done + count, note=note)

    def line(self) -> str:
        """Where the work stands, as text."""
        elapsed_s = self._clock() - self._start_s
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.what} {self.done}{of} {self.unit}"]
        if self.total:
            parts.append(f"{100 * self.done // self.total}%")
        if elapsed_s > 0:
            parts.append(f"{_number((self.done - self._first) / elapsed_s)} {self.unit}/s")
        left_s = self.left_s()
        if left_s is not None and self.total is not None and self.done < self.total:
            parts.append(f"ETA {clock_text(left_s)}")
        else:
            parts.append(f"in {clock_text(elapsed_s)}")
        return "  ".join([*parts, self.note] if self.note else parts)

    def left_s(self) -> float | None:
        """Seconds left at the recent rate; None when it cannot be known."""
        if self.total is None or len(self._recent) < 2:
            return None
        (then_s, before), (_, done) = self._recent[0], self._recent[-1]
        passed_s = self._clock() - then_s
        if done <= before or passed_s <= 0:
            return None
        return max(self.total - done, 0) * passed_s / (done - before)

    def _show(self, now_s: float) -> None:
        if self._bar is not None:
            self._draw()
        elif now_s - self._start_s < QUIET_S:
            return
        elif self._stream.isatty():
            self._bar = _bar(self._stream)
            self._bar.start()
            self._bar.add_task("", total=self.total)
            self._draw()
        elif self._printed is None or now_s - self._shown_s >= PLAIN_EVERY_S:
            self._shown_s = now_s
            self._print()

    def _draw(self) -> None:
        self._bar.update(self._bar.task_ids[0], completed=self.done, total=self.total, description=self.line())

    def _print(self) -> None:
        self._printed = self.done
        print(self.line(), file=self._stream, flush=True)


def track(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "items", quiet: bool = False
) -> Iterator[T]:
    """Pass the items on and show how many went by.

    >>> list(track("abc", "read", 3, quiet=True))
    ['a', 'b', 'c']
    """
    with Progress(what, total, unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.advance()


def clock_text(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock_text(75.4), clock_text(7265)
    ('1:15', '2:01:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    return Bar(*columns, console=Console(file=stream), refresh_per_second=5)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _text(note: object) -> str:
    return " ".join(f"{name} {count}" for name, count in note.items()) if isinstance(note, Mapping) else str(note)
