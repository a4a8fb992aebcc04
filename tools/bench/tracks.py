"""The tracks of the benchmark, never mixed: each gives tables of contestants that did the same work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmill.tools.bench.contest import Entry, Result, Truth, contest
from clipmill.tools.bench.corpus import Data, flat_footage, pack_corpus
from clipmill.tools.bench.patterns import PATTERNS, Pattern, requests
from clipmill.tools.bench.peer import BATCH

_PEERS = ("torchcodec", "torchcodec approximate", "decord", "PyAV seek", "webdataset + torchcodec")
_NEWER = ("torchcodec", "torchcodec approximate", "SPDL")
_REQUESTS = 2048  # most of one turn
GOPS = (1, 4, 8, 12, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How everything is measured.

    rounds: counted ones. seconds: about how long one turn takes. pythons: other interpreters with other versions of
    the peers. peers: those that take part, () = all. folder: where data are written. say: progress.
    """

    rounds: int
    seconds: float
    pythons: tuple[str, ...]
    peers: tuple[str, ...]
    folder: Path
    say: Callable[[str], None]


@dataclass(slots=True)
class Table:
    """The outcome of one contest. facts: of the data, or of the whole."""

    track: str
    data: str
    pattern: str
    results: list[Result]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "track": self.track,
            "data": self.data,
            "pattern": self.pattern,
            "results": [result.to_json() for result in self.results],
            "facts": self.facts,
        }


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def one_core() -> list[int]:
    """A core for single-threaded contestants: the last one, which the system uses least."""
    return cores()[-1:]


def peers(setting: Setting, names: Sequence[str]) -> list[Entry]:
    """The peers of this interpreter, and of the others torchcodec and SPDL, of which they may have newer versions."""
    entries = [Entry(label=name, name=name) for name in names]
    for python in setting.pythons:
        entries += [Entry(label=f"{name} ({_place(python)})", name=name, python=python) for name in _NEWER]
    return [entry for entry in entries if not setting.peers or entry.name in setting.peers]


def _place(python: str) -> str:
    """A short name of an interpreter that says nothing about this machine."""
    return "other" if "/" in python else python


def ours(data: Data, label: str = "clipmill", name: str = "clipmill", role: str = "ours", **order: Any) -> Entry:
    """One of clipmill's contestants."""
    return Entry(label=label, name=name, role=role, order={"root": str(data.root), **order})


def _run(
    setting: Setting,
    track: str,
    data: Data,
    pattern: Pattern,
    entries: Sequence[Entry],
    *,
    files: Sequence[str],
    sounds: Sequence[str],
    out: str = "uint8",
    pin: bool = True,
    most: int = _REQUESTS,
) -> Table:
    setting.say(f"{track}: {data.name}, {pattern.name}")
    fps = float(data.index[0].fps)
    wanted = requests(pattern, data.frames, fps, setting.rounds + 1, most)
    order = {"files": list(files), "sounds": list(sounds), "out": out, "cores": one_core() if pin else None}
    truth = Truth(files) if out == "uint8" else None
    results = contest(
        entries, order, wanted, seconds=setting.seconds, unit=min(BATCH, most), truth=truth, say=setting.say
    )
    return Table(track, data.name, pattern.name, results, data.facts())


def raw(setting: Setting, data: Data, pattern: Pattern) -> Table:
    """Everybody starts from the same original files; clipmill from its shard of them."""
    entries = [ours(data), *peers(setting, _PEERS)]
    return _run(setting, "raw", data, pattern, entries, files=data.raw, sounds=data.raw_sounds)


def same_bits(setting: Setting, data: Data, pattern: Pattern) -> Table:
    """Everybody decodes the same re-encoded streams, one core each; with the floors."""
    names = [*_PEERS, "torchcodec kept open"]
    if data.index[0].codec.codec == "mjpeg":
        names.append("DALI")
    entries = [
        ours(data),
        ours(data, "clipmill RGB", "clipmill RGB"),
        ours(data, "decode floor", "decode floor", "floor"),
        ours(data, "copy floor", "copy floor", "floor"),
        *peers(setting, names),
    ]
    if pattern.sound_s:
        entries = [entry for entry in entries if entry.role != "floor"]
    return _run(setting, "same bits", data, pattern, entries, files=data.same_bits, sounds=data.same_sounds)


def end_to_end(setting: Setting, data: Data, pattern: Pattern) -> Table:
    """From the disk to normalised float batches of random resized crops, one core each."""
    entries = [ours(data), *peers(setting, _PEERS)]
    return _run(
        setting, "end to end", data, pattern, entries, files=data.same_bits, sounds=data.same_sounds, out="float"
    )


def scaling(setting: Setting, data: Data, pattern: Pattern) -> Table:
    """Threads and processes, on all cores."""
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= len(cores())]
    entries = [ours(data, f"{n} thread{'s' * (n > 1)}", threads=n) for n in counts]
    entries += [ours(data, f"{n} process{'es' * (n > 1)}", threads=1, processes=n) for n in counts]
    entries.append(ours(data, "auto", threads=0, processes=-1))
    return _run(setting, "scaling", data, pattern, entries, files=data.same_bits, sounds=data.same_sounds, pin=False)


def flat(setting: Setting) -> Data:
    """A corpus of tiny pictures."""
    return pack_corpus(flat_footage(setting.folder / "flat", 4), setting.folder / "flat-packed", None)


def ceiling(setting: Setting) -> Table:
    """Frames that cost nothing to decode: what the loader itself can move, on all cores."""
    table = scaling(setting, flat(setting), PATTERNS["clip"])
    table.track = "ceiling"
    return table


def gop_lengths(setting: Setting, folder: Path, short_side: int, gops: Sequence[int] = GOPS) -> list[Table]:
    """One thread at several distances of key frames, clips of stride 1 and 4."""
    packed = [pack_corpus(folder, setting.folder / f"{folder.name}-gop{gop}", short_side, gop) for gop in gops]
    tables = []
    for name in ("clip", "stride4"):
        entries = [ours(data, f"GOP {gop}") for data, gop in zip(packed, gops, strict=True)]
        table = _run(setting, "GOP length", packed[0], PATTERNS[name], entries, files=packed[0].same_bits, sounds=())
        for data, result in zip(packed, table.results, strict=True):
            facts = data.facts()
            result.facts |= {key: facts[key] for key in ("packed_mb_per_10s", "psnr_db")}
        tables.append(table)
    return tables


def profiles(setting: Setting, folder: Path, short_side: int) -> list[Table]:
    """The encodings that `clipmill pack` knows, for clips and for sparse frames."""
    from clipmill.pipeline.pack.settings import PROFILES

    def packed(name: str, gop: int = 8, profile: str = "cpu") -> tuple[str, Data]:
        return name, pack_corpus(folder, setting.folder / f"{folder.name}-{name}", short_side, gop, profile)

    known = [packed("cpu"), packed("intra", gop=1)]
    known += [packed(name, profile=name) for name in ("jpeg", "raw") if name in PROFILES]
    tables = []
    for name in ("clip", "segments", "frame"):
        entries = [ours(data, label) for label, data in known]
        first = known[0][1]
        table = _run(setting, "profile", first, PATTERNS[name], entries, files=first.same_bits, sounds=())
        for (_, data), result in zip(known, table.results, strict=True):
            facts = data.facts()
            result.facts |= {key: facts[key] for key in ("packed_mb_per_10s", "psnr_db")}
            result.right_frames = None
        tables.append(table)
    return tables


def cache(setting: Setting, data: Data, pattern: Pattern) -> Table:
    """Later epochs from the cache of decoded frames, against decoding and against a plain copy."""
    size = sum(one.num_frames * one.height * one.width * 3 / 2 for one in data.index) / 2**30
    entries = [
        ours(data),
        ours(data, "clipmill, cached", cache_gb=size * 1.1 + 0.001),
        ours(data, "copy floor", "copy floor", "floor"),
    ]
    return _run(setting, "cache", data, pattern, entries, files=data.same_bits, sounds=data.same_sounds)
