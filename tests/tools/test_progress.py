"""Progress: silent for short work, lines with rate and remaining time for long work, a bar on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from clipmill.tools.progress import PLAIN_EVERY_S, QUIET_S, Progress, clock_text, track


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(seconds_per_item: float, total: int, **options) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with Progress("pack", total, "files", stream=stream, clock=clock, **options) as progress:
        for done in range(1, total + 1):
            clock.now_s += seconds_per_item
            progress(done, total)
    return stream.getvalue().splitlines()


def test_short_work_is_silent():
    assert run(QUIET_S / 20, 10) == []


def test_long_work_gives_a_line_now_and_then_and_a_last_one():
    lines = run(1.0, 20)
    assert lines[0] == "pack 2/20 files  10%  1.0 files/s  ETA 0:18"
    assert lines[1] == f"pack {2 + round(PLAIN_EVERY_S)}/20 files  35%  1.0 files/s  ETA 0:13"
    assert lines[-1] == "pack 20/20 files  100%  1.0 files/s  in 0:20"
    assert len(lines) == 2 + round((20 - 2) // PLAIN_EVERY_S)


def test_quiet_says_nothing():
    assert run(1.0, 20, quiet=True) == []


def test_an_error_leaves_no_last_line():
    clock, stream = Clock(), io.StringIO()

    def work() -> None:
        with Progress("pack", 9, stream=stream, clock=clock) as progress:
            clock.now_s += 3
            progress.advance()
            clock.now_s += 1
            progress.advance()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert len(stream.getvalue().splitlines()) == 1


def test_work_of_an_earlier_run_is_not_part_of_the_rate():
    clock = Clock()
    progress = Progress("pack", 1000, "files", clock=clock, stream=io.StringIO())
    progress(900)
    clock.now_s += 10
    progress(910)
    assert "910/1000" in progress.line()
    assert "1.0 files/s" in progress.line()
    assert progress.left_s() == pytest.approx(90)


def test_a_late_first_report_is_part_of_the_rate():
    clock = Clock()
    progress = Progress("pack", 100, "files", clock=clock, stream=io.StringIO())
    clock.now_s += 5
    progress(50)
    assert progress.left_s() == pytest.approx(5)


def test_the_remaining_time_follows_the_recent_rate():
    clock = Clock()
    progress = Progress("pack", 1000, clock=clock, stream=io.StringIO())
    for step in range(200):  # 100 s at 1 per s, then 100 s at 2 per s
        clock.now_s += 1
        progress.advance(1 if step < 100 else 2)
    assert progress.done == 300
    assert progress.left_s() == pytest.approx(350, rel=0.02)


def test_unknown_total_and_notes():
    clock = Clock()
    progress = Progress("scan", unit="files", clock=clock, stream=io.StringIO())
    clock.now_s += 4
    progress(8, None, {"ok": 7, "rejected": 1})
    assert progress.line() == "scan 8 files  2.0 files/s  in 0:04  ok 7 rejected 1"
    assert progress.left_s() is None


def test_counts_from_many_threads():
    with Progress("read", 800, quiet=True) as progress:
        threads = [threading.Thread(target=lambda: [progress.advance() for _ in range(100)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert progress.done == 800


def test_track_passes_everything_on():
    assert list(track(range(5), "read", 5, quiet=True)) == list(range(5))


def test_clock_text_rounds_up_to_the_next_unit():
    assert [clock_text(s) for s in (0, 59.6, 3599.7, 36000)] == ["0:00", "1:00", "1:00:00", "10:00:00"]


def test_a_terminal_gets_one_bar_that_is_redrawn():
    code = (
        "from clipmill.tools.progress import Progress\n"
        "now = [0.0]\n"
        "with Progress('pack', 40, 'files', clock=lambda: now[0]) as progress:\n"
        "    for _ in range(40):\n"
        "        now[0] += 1.0\n"
        "        progress.advance(note='[bold]x')\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the closed terminal this way
        while part := os.read(leader, 65536):
            shown += part
    os.close(leader)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "━" in text
    assert "pack 40/40 files  100%  1.0 files/s  in 0:40  [bold]x" in text
    assert "\x1b[" in shown.decode()
