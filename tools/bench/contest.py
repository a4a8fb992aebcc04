"""Contests: every contestant in a process of its own, one at a time, round after round."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.tools.bench.patterns import Request

_SHOWN = 8  # requests whose frames are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One contestant of a contest.

    label: how it is called in the results. name: of the contestant in `clipmill.tools.bench.peer`, or in
    `clipmill.tools.bench.ours` if ``ours``. python: interpreter, None = this one. order: what it is told. role: peer,
    ours or floor.
    """

    label: str
    name: str
    role: str = "peer"
    python: str | None = None
    order: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The command line of its process."""
        if self.role == "peer":
            return [self.python or sys.executable, str(Path(__file__).with_name("peer.py"))]
        return [sys.executable, "-m", "clipmill.tools.bench.ours"]


@dataclass(slots=True)
class Result:
    """What one contestant did. clips_s, cpu_clips_s: per round, by wall clock and per second of processor time."""

    label: str
    role: str
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    warm_up: dict[str, float] = field(default_factory=dict)
    clips_s: list[float] = field(default_factory=list)
    cpu_clips_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    right_frames: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form with the quartiles."""
        return asdict(self) | {"quartiles": quartiles(self.clips_s), "cpu_quartiles": quartiles(self.cpu_clips_s)}


def quartiles(values: Sequence[float]) -> list[float] | None:
    """[first quartile, median, third quartile]; None without values.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    [2.0, 3.0, 4.0]
    """
    return [float(q) for q in np.percentile(values, (25, 50, 75))] if values else None


def ratios(mine: Result, other: Result, cpu: bool = False) -> list[float]:
    """Speed of one over that of the other, round by round."""
    a, b = (mine.cpu_clips_s, other.cpu_clips_s) if cpu else (mine.clips_s, other.clips_s)
    return [x / y for x, y in zip(a, b, strict=True)] if a and b else []


class Process:
    """The other end of `clipmill.tools.bench.peer.serve`."""

    def __init__(self, entry: Entry, order: Mapping[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            entry.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )
        self.hello = self.ask({**order, "name": entry.name, **entry.order})

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer; {"missing": why} when the process ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"missing": self._last_words()}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"missing": self._last_words()}

    def _last_words(self) -> str:
        self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"ended with code {self._process.returncode}"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def contest(
    entries: Sequence[Entry],
    order: Mapping[str, Any],
    requests: Sequence[Sequence[Request]],
    *,
    seconds: float,
    unit: int = 32,
    truth: Callable[[int, int], list[float]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Let all entries serve the same requests in turn: A B C, A B C, ...

    requests: one list per round; round 0 is the warm-up, which is reported and not counted. seconds: about how long
    one turn may take; slow contestants serve fewer requests of a round. unit: a turn is a multiple of so many
    requests, as far as there are any. truth: fingerprint of a frame of a file, to see who gives the right frames.
    """
    message = {**order, "requests": requests}
    results = [Result(entry.label, entry.role) for entry in entries]
    processes: list[Process] = []
    try:
        for entry, result in zip(entries, results, strict=True):
            say(f"starting {entry.label}")
            processes.append(Process(entry, message))
            hello = processes[-1].hello
            result.missing, result.versions = hello.get("missing", ""), hello.get("versions", {})
            result.warm_up["start_s"] = hello.get("start_s", 0.0)
        counts = [
            0 if result.missing else _warm_up(process, result, len(requests[0]), seconds, unit)
            for process, result in zip(processes, results, strict=True)
        ]
        for number in range(1, len(requests)):
            for process, result, count in zip(processes, results, counts, strict=True):
                if not result.missing:
                    say(f"round {number} of {len(requests) - 1}: {result.label}")
                    _book(result, process.ask({"round": number, "count": count}), count)
        for process, entry, result in zip(processes, entries, results, strict=True):
            if truth is not None and entry.role != "floor" and not result.missing:
                result.right_frames = _right_frames(process, requests[0], truth)
    finally:
        for process in processes:
            process.close()
    return results


def _warm_up(process: Process, result: Result, most: int, seconds: float, unit: int) -> int:
    """Run round 0 twice, first with a few requests; returns how many fit one turn."""
    count = min(unit, most)
    for goal_s in (seconds / 4, seconds):
        answer = process.ask({"round": 0, "count": count})
        if "missing" in answer:
            result.missing = answer["missing"]
            return 0
        result.warm_up |= {"clips_s": count / answer["wall_s"], "first_s": answer["first_s"]}
        count = int(min(max(goal_s * count / answer["wall_s"] // unit, 1) * unit, most))
    return count


def _book(result: Result, answer: dict[str, Any], count: int) -> None:
    if "missing" in answer:
        result.missing = answer["missing"]
        return
    result.clips_s.append(count / answer.pop("wall_s"))
    result.cpu_clips_s.append(count / max(answer.pop("cpu_s"), 1e-9))
    result.first_s.append(answer.pop("first_s"))
    result.memory_mb = max(result.memory_mb, answer.pop("memory_mb"))
    frames = answer.pop("frames")
    if answer.get("decoded"):
        result.facts["decoded_per_used"] = answer.pop("decoded") / max(frames, 1)
    result.facts |= answer | {"count": count}


def _right_frames(
    process: Process, requests: Sequence[Request], truth: Callable[[int, int], list[float]]
) -> float | None:
    """Share of the requests whose frames look most like those asked for, not like those before or after them.

    All frames of a request are compared at once, and only how they change: colour conversions differ between decoders
    by more than neighbouring frames of a calm scene do, in level and in contrast. None where a request has one frame
    only.
    """
    asked = [(file, [frame for frames in clips for frame in frames]) for file, clips, _ in requests[:_SHOWN]]
    shown = process.ask({"show": len(asked)}).get("fingerprints")
    if shown is None or len(asked[0][1]) < 2:
        return None
    good = 0
    for (file, frames), prints in zip(asked, shown, strict=True):
        seen = np.asarray(prints)
        costs = {}
        for shift in (0, -2, -1, 1, 2):
            known = [truth(file, frame + shift) for frame in frames]
            if all(known):
                x, y = np.asarray(known) - np.mean(known, 0), seen - seen.mean(0)
                norm = float(np.linalg.norm(x) * np.linalg.norm(y))
                costs[shift] = -float((x * y).sum()) / norm if norm else 0.0
        good += min(costs, key=lambda shift: costs[shift]) == 0
    return good / len(asked)


class Truth:
    """Fingerprints of all frames of the videos, by decoding them from the beginning; decoded when first asked for."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._known: dict[int, list[list[float]]] = {}

    def __call__(self, file: int, frame: int) -> list[float]:
        """The fingerprint of a frame; empty outside the video."""
        import av

        from clipmill.tools.bench.peer import fingerprint, luma_to_gray

        if file not in self._known:
            with av.open(self._files[file]) as container:
                planes = (one.to_ndarray(format="yuv420p")[: one.height] for one in container.decode(video=0))
                self._known[file] = [fingerprint(luma_to_gray(plane)) for plane in planes]
        known = self._known[file]
        return known[frame] if 0 <= frame < len(known) else []
