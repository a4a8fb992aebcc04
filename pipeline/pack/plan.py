"""What is decided before the first source is opened: where shards end, what repeats another, which task packs what.

The plan lies in the output folder from the first moment on; whoever works there later follows it, or is told that its
corpus or settings are others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.pack import write
from clipmill.pipeline.pack.engine import Engine
from clipmill.pipeline.pack.outcome import Rejected
from clipmill.pipeline.pack.probe import Media
from clipmill.pipeline.pack.settings import PackSettings

PLAN_VERSION = 1
PLAN_FILE = "plan.json"
_PART_BYTES_PER_S = 1_000_000  # guessed size of a part of a long file


class PackError(ValueError):
    """Nothing could be packed, or the output folder belongs to something else."""


@dataclass(frozen=True, slots=True)
class Share:
    """Task ``number`` of ``of``, counted from 1: of every ``of`` shards it packs one."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"task {self}: tasks are numbered from 1/{self.of} to {self.of}/{self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shards(self, count: int) -> range:
        """Numbers of this task's shards.

        >>> [list(Share(number, 3).shards(5)) for number in (1, 2, 3)]
        [[0, 3], [1, 4], [2]]
        """
        return range(self.number - 1, count, self.of)


@dataclass(frozen=True, slots=True)
class Plan:
    """stops: number of the first source after each shard. duplicates: source number to the one that it repeats."""

    stops: list[int]
    duplicates: dict[int, int]

    def shard(self, number: int) -> list[int]:
        """Numbers of the sources of one shard."""
        first = self.stops[number - 1] if number else 0
        return [source for source in range(first, self.stops[number]) if source not in self.duplicates]


def make_plan(
    out: Path,
    corpus: Corpus,
    sizes: Sequence[int],
    settings: PackSettings,
    fingerprint: dict[str, Any],
    engine: Engine,
) -> Plan:
    """The plan in ``out``, made if there is none; PackError if what is there was planned from something else."""
    path = out / write.WORK_FOLDER / PLAN_FILE
    if path.is_file():
        saved = json.loads(path.read_text())
        compare(out, saved["fingerprint"], fingerprint, "began to be packed")
        return Plan(saved["stops"], {int(k): v for k, v in saved["duplicates"].items()})
    plan = Plan(_stops(corpus.sources, sizes, settings), _duplicates(corpus.sources, sizes, engine))
    (out / write.WORK_FOLDER / "done").mkdir(exist_ok=True)
    write.write_json(path, {"fingerprint": fingerprint, "stops": plan.stops, "duplicates": plan.duplicates})
    return plan


def digest_source(path: str) -> str:
    """The content digest of a file as hex, or nothing for what cannot be read; runs in a worker."""
    try:
        with Media(path) as media:
            return media.digest().hex()
    except Rejected:
        return ""


def _duplicates(sources: Sequence[Source], sizes: Sequence[int], engine: Engine) -> dict[int, int]:
    """Sources with the same content and part as an earlier one. Only files of equal size are read for it."""
    by_size: dict[tuple, list[int]] = {}
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if size > 0:
            by_size.setdefault((size, source.start_s, source.end_s), []).append(number)
    groups = [numbers for numbers in by_size.values() if len(numbers) > 1]
    paths = list(dict.fromkeys(os.path.abspath(sources[number].path) for numbers in groups for number in numbers))
    digests = {path: answer for path, answer in engine(digest_source, paths) if isinstance(answer, str)}
    found: dict[int, int] = {}
    for numbers in groups:
        first: dict[str, int] = {}
        for number in numbers:
            digest = digests.get(os.path.abspath(sources[number].path))
            if digest and first.setdefault(digest, number) != number:
                found[number] = first[digest]
    return dict(sorted(found.items()))


def _stops(sources: Sequence[Source], sizes: Sequence[int], settings: PackSettings) -> list[int]:
    """Where shards end: after so many sources, or so many bytes of source files."""
    stops, clips, size = [], 0, 0.0
    for number, source in enumerate(sources):
        part = max(sizes[number], 0)
        if source.end_s is not None:
            part = min(part, (source.end_s - (source.start_s or 0)) * _PART_BYTES_PER_S)
        if clips and (clips == settings.shard_clips or size + part > settings.shard_gb * 1e9):
            stops.append(number)
            clips, size = 0, 0.0
        clips, size = clips + 1, size + part
    return [*stops, len(sources)]


def fingerprint_of(corpus: Corpus, sizes: Sequence[int], settings: PackSettings) -> dict[str, Any]:
    """What must not change between two calls for the same folder."""
    state = hashlib.blake2b(digest_size=16)
    for source, size in zip(corpus.sources, sizes, strict=True):
        row = (source.key, source.label, source.labels, source.split, source.start_s, source.end_s, size)
        state.update(json.dumps([*row, dict(source.extra)], default=str).encode())
    state.update(json.dumps([corpus.classes, corpus.missing]).encode())
    return {
        "version": PLAN_VERSION,
        "corpus": state.hexdigest(),
        "sources": len(corpus.sources),
        "settings": settings.to_json(),
    }


def compare(out: Path, old: dict[str, Any], new: dict[str, Any], how: str) -> None:
    """Raise PackError unless both fingerprints are the same."""
    if old == new:
        return
    remedy = "choose another output folder or remove this one"
    before, now = old["settings"], new["settings"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise PackError(f"{out}: {how} with {name} = {before.get(name)}, not {now.get(name)}; {remedy}")
    raise PackError(
        f"{out}: {how} from other sources ({old['sources']} then, {new['sources']} now, or other names, labels or file "
        f"sizes); {remedy}"
    )


def size_of(path: str) -> int:
    """Bytes of a file, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
