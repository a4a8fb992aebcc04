"""Access patterns: which frames a benchmark asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Request = tuple[int, list[list[int]], list[float] | None]  # file, clips, (start_s, duration_s) of the sound


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One kind of access to one random video after the other.

    clips: per video, each of ``frames`` frames ``stride`` apart. segments: instead one random frame from each of
    ``frames`` equal parts of the video. whole: all frames. sound_s: length of the waveform that begins with the clip.
    """

    name: str
    frames: int = 16
    stride: int = 1
    clips: int = 1
    segments: bool = False
    whole: bool = False
    sound_s: float = 0.0


PATTERNS = {
    "clip": Pattern(name="16 frames, stride 1"),
    "stride2": Pattern(name="16 frames, stride 2", stride=2),
    "stride4": Pattern(name="16 frames, stride 4", stride=4),
    "clips2": Pattern(name="2 clips of 16", clips=2),
    "clips4": Pattern(name="4 clips of 16", clips=4),
    "segments": Pattern(name="8 segments x 1 frame", frames=8, segments=True),
    "frame": Pattern(name="1 frame", frames=1),
    "sound": Pattern(name="16 frames + 2 s sound", sound_s=2.0),
    "dense": Pattern(name="dense", whole=True),
}


def requests(
    pattern: Pattern, num_frames: Sequence[int], fps: float, rounds: int, count: int, seed: int = 0
) -> list[list[Request]]:
    """``rounds`` lists of ``count`` requests; all rounds visit the same videos in the same order.

    num_frames: of every video. Videos that are too short for the pattern are left out.
    """
    rng = np.random.default_rng(seed)
    extent = (pattern.frames - 1) * pattern.stride + 1
    least = min(num_frames) if pattern.whole else max(extent, pattern.frames, int(np.ceil(pattern.sound_s * fps)))
    usable = [number for number, frames in enumerate(num_frames) if frames >= least]
    if not usable:
        raise ValueError(f"no video has the {least} frames that the pattern {pattern.name!r} needs")
    files = [usable[i] for i in rng.permutation(count) % len(usable)]
    return [
        [_request(pattern, rng, file, num_frames[file], min(num_frames), fps) for file in files] for _ in range(rounds)
    ]


def _request(pattern: Pattern, rng: np.random.Generator, file: int, frames: int, shortest: int, fps: float) -> Request:
    if pattern.whole:
        return file, [list(range(shortest))], None
    if pattern.segments:
        edges = np.linspace(0, frames, pattern.frames + 1).astype(int)
        return file, [[int(rng.integers(a, b)) for a, b in pairwise(edges.tolist())]], None
    extent = (pattern.frames - 1) * pattern.stride + 1
    room = frames - max(extent, int(np.ceil(pattern.sound_s * fps))) + 1
    starts = np.sort(rng.integers(0, room, pattern.clips)).tolist()
    clips = [list(range(start, start + extent, pattern.stride)) for start in starts]
    return file, clips, [starts[0] / fps, pattern.sound_s] if pattern.sound_s else None
