"""``clipmill bench``: loading speed against peers and floors, measured in the same run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from clipmill.tools.bench.tracks import Setting, Table

Track = Literal[
    "raw", "same-bits", "end-to-end", "loader", "profiles", "gop", "cache", "pack", "augment", "step", "soak", "index"
]
Access = Literal["clip", "stride2", "stride4", "clips2", "clips4", "segments", "frame", "sound", "dense"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure how fast clips are loaded, against other libraries and against what the hardware allows.

    Every contestant works in a process of its own; they take turns, so that other work on the machine hits all alike.
    A peer that is not installed is left out and named. Without --data, videos are made up: 340 x 256, 10 s, a key frame
    every 250 frames, as Kinetics is most often packaged.
    """

    data: Path | None = None
    """Folder of video files to measure on."""
    track: tuple[Track, ...] = ("raw", "same-bits", "end-to-end", "loader")
    """What to measure. raw: everybody reads the original files, clipmill its shards. same-bits: everybody reads the
    streams of the shards. end-to-end: to normalised 112 x 112 float batches. loader: threads and processes, and tiny
    frames. profiles, gop: encodings. cache: later epochs. pack: against ffmpeg. augment: the fused kernel. step: up to
    an optimiser step. soak: memory over many clips. index: very many records."""
    pattern: tuple[Access, ...] = ("clip",)
    """Which frames are wanted of each video; clip = 16 frames, stride 1, at a random place."""
    rounds: int = 5
    """Rounds that count, after one that does not."""
    seconds: float = 1.0
    """About how long a contestant's turn takes."""
    videos: int = 4
    """How many videos are made up."""
    short_side: int = 128
    """Short side of packed pictures, in pixels."""
    clips: int = 50_000
    """Clips of the soak."""
    records: int = 1_000_000
    """Records of the index track."""
    record_frames: int = 300
    """Frames of each of them."""
    steps: int = 4
    """Steps of the step track."""
    device: str = "auto"
    """Where augment and step run: cpu, cuda, or auto."""
    python: tuple[str, ...] = ()
    """Other Python interpreters, whose torchcodec and SPDL take part as well."""
    peer: tuple[str, ...] = ()
    """Peers that take part, e.g. "torchcodec approximate" decord "PyAV seek"; default: all."""
    keep: Path | None = None
    """Folder for the data that are made; default: a temporary one."""
    out: Path | None = None
    """Folder for bench.json, RESULTS.md and bench.html; results of other tracks that are there are kept."""
    machine: str | None = None
    """What the results say about this machine; default: its cores and system."""
    json: bool = False
    """Print JSON instead of tables, and no progress."""


def main(args: Args) -> int:
    """Measure, print and write."""
    import json

    from clipmill.tools.bench import results
    from clipmill.tools.bench.peer import PEERS
    from clipmill.tools.bench.tracks import Setting
    from clipmill.tools.progress import Progress

    if min(args.rounds, args.seconds, args.videos, args.clips, args.records, args.record_frames, args.steps) <= 0:
        raise ValueError(
            "--rounds, --seconds, --videos, --clips, --records, --record-frames and --steps must be more than 0"
        )
    for name in args.peer:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; choose from {', '.join(PEERS)}")
    before = None
    if args.out is not None and (args.out / "bench.json").exists():
        before = json.loads((args.out / "bench.json").read_text("utf-8"))
    with _folder(args.keep) as folder, Progress("bench", unit="steps", quiet=args.json) as progress:
        setting = Setting(
            rounds=args.rounds,
            seconds=args.seconds,
            pythons=args.python,
            peers=args.peer,
            folder=folder,
            say=lambda what: progress.advance(note=what),
        )
        found = results.merged(before, [])
        for table in _tables(args, setting):
            load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
            found = results.merged(found, [table.to_json()], machine=args.machine or results.machine(), load=load)
            if args.out is not None:
                results.write(args.out, found)
    print(json.dumps(found) if args.json else results.text(found))
    return 0


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as name:
        yield Path(name)


def _tables(args: Args, setting: Setting) -> Iterator[Table]:
    """All tables that were asked for, one after the other."""
    from clipmill.tools.bench import million, parts, tracks
    from clipmill.tools.bench.corpus import make_footage, pack_corpus, videos
    from clipmill.tools.bench.packing import packing
    from clipmill.tools.bench.patterns import PATTERNS

    if args.data is None:
        setting.say("making videos")
        folder = make_footage(setting.folder / "footage", args.videos)
    else:
        folder = args.data
        videos(folder)
    setting.say("packing")
    data = pack_corpus(folder, setting.folder / f"{folder.name}-packed", args.short_side)
    patterns = [PATTERNS[name] for name in args.pattern]
    by_pattern = {"raw": tracks.raw, "same-bits": tracks.same_bits, "end-to-end": tracks.end_to_end}
    by_pattern["cache"] = tracks.cache
    for track in args.track:
        if track in by_pattern:
            for pattern in patterns:
                yield by_pattern[track](setting, data, pattern)
        elif track == "loader":
            yield tracks.scaling(setting, data, PATTERNS["clip"])
            yield tracks.ceiling(setting)
        elif track == "profiles":
            yield from tracks.profiles(setting, folder, args.short_side)
        elif track == "gop":
            yield from tracks.gop_lengths(setting, folder, args.short_side)
        elif track == "pack":
            yield packing(setting, folder, args.short_side)
        elif track == "augment":
            yield parts.augmenting(setting, data, _device(args.device))
        elif track == "step":
            yield parts.stepping(setting, data, _device(args.device), args.steps)
        elif track == "soak":
            yield parts.soak(setting, tracks.flat(setting), args.clips)
        else:
            facts = million.measure(data.index, setting.folder / "records", args.records, frames=args.record_frames)
            yield tracks.Table("index", data.name, "", [], facts)


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
