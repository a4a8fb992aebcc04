"""`audit`: a whole packed data set against itself - shards, index, packets, sound, lists, and if wanted every frame."""

from __future__ import annotations

import json
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.decode.decoder import DecodeError, Decoder, UnsupportedCodecError
from clipmill.pipeline.decode.pyav import PyavDecoder
from clipmill.pipeline.decode.raw import RawDecoder
from clipmill.pipeline.index_file import index_digest
from clipmill.pipeline.pack.audio import HEADER_BYTES, wav_header
from clipmill.pipeline.pack.engine import Engine, Failure
from clipmill.pipeline.pack.write import DATASET_FILE, MANIFEST_FILE, REJECTS_FILE, content_digest
from clipmill.pipeline.record import INDEX_FILE, SCHEMA_VERSION, ShardIndex, VideoRecord
from clipmill.pipeline.remote import local_copy
from clipmill.pipeline.shard import Reader, ShardError, ShardReader, file_digest, members

_PACKETS = 512  # read at a time


@dataclass(frozen=True, slots=True)
class Problem:
    """where: a file, or a record of it. what: one sentence."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to look at. entry: its row of dataset.json. indexed: the index can be opened."""

    root: str
    entry: dict[str, Any]
    decode: bool
    indexed: bool


def audit(
    root: Path, engine: Engine, *, decode: bool = False, on_progress: Callable[[int, int], object] | None = None
) -> list[Problem]:
    """Everything that is wrong with the data set in ``root``, shard by shard in worker processes.

    decode: decode every frame too. Raises ValueError where there is no data set.
    """
    path = root / DATASET_FILE
    if not path.is_file():
        unfinished = " `clipmill pack` has not finished here; run it again" if (root / ".pack").is_dir() else ""
        raise ValueError(f"{root}: no {DATASET_FILE} there; is this a folder made by `clipmill pack`?{unfinished}")
    try:
        dataset = json.loads(path.read_text())
        shards = [dict(entry) for entry in dataset["shards"]]
        names = [str(entry["name"]) for entry in shards]
        counts, digest = dict(dataset["counts"]), dataset["digest"]
        if strangers := [name for name in names if name != Path(name).name or name.startswith(".")]:
            return [Problem(DATASET_FILE, f"names a shard outside its folder, {strangers[0]!r}")]
    except (ValueError, KeyError, TypeError) as error:
        return [Problem(DATASET_FILE, f"damaged ({error!r})")]
    problems = _whole(root, dataset, names, counts, digest)
    indexed = not any(problem.where == "index.arrow" for problem in problems)
    tasks = [ShardTask(str(root), entry, decode, indexed) for entry in shards]
    with closing(engine(check_shard, tasks)) as answers:
        for done, (task, answer) in enumerate(answers, 1):
            if isinstance(answer, Failure):
                answer = [Problem(task.entry["name"], f"could not be checked: {answer.reason}, {answer.detail}")]
            problems += answer
            if on_progress is not None:
                on_progress(done, len(tasks))
    return sorted(problems, key=lambda problem: problem.where)


def _whole(root: Path, dataset: dict[str, Any], names: list[str], counts: dict[str, Any], digest: str) -> list[Problem]:
    """What can be said without opening a shard."""
    problems = []
    if dataset.get("schema_version") != SCHEMA_VERSION:
        version = dataset.get("schema_version")
        problems.append(Problem(DATASET_FILE, f"schema version {version}, this clipmill reads {SCHEMA_VERSION}"))
    for name in (INDEX_FILE, MANIFEST_FILE, REJECTS_FILE):
        path = root / name
        if not path.is_file() or file_digest(path) != dataset.get("files", {}).get(name):
            problems.append(Problem(name, "is missing, or not what was written (digest differs)"))
    there = {path.name for path in root.glob("shard-*")}
    problems += [Problem(name, "is not listed in dataset.json") for name in sorted(there - set(names))]
    keys: list[str] = []
    try:
        index = ShardIndex.open(root)
        keys = [record.key for record in index]
        if index_digest(index) != digest or index.digest != digest:
            problems.append(Problem("index.arrow", f"its records do not give the digest {digest} of dataset.json"))
        if sorted({path.name for path in index.shards}) != sorted(names):
            problems.append(Problem("index.arrow", "names other shards than dataset.json"))
        if len(keys) != counts["ok"] + counts["salvaged"]:
            problems.append(Problem("index.arrow", f"{len(keys)} records, dataset.json counts otherwise"))
        double = [key for key, count in Counter(keys).items() if count > 1]
        problems += [Problem("index.arrow", f"the key {key!r} is there more than once") for key in double]
    except (ValueError, KeyError, IndexError) as error:
        problems.append(Problem("index.arrow", str(error)))
    try:
        listed = pq.read_table(str(root / MANIFEST_FILE), columns=["key"]).column("key").to_pylist()
        if keys and listed != keys:
            problems.append(Problem(MANIFEST_FILE, "its rows are not the records of the index"))
    except (OSError, pa.ArrowException) as error:
        problems.append(Problem(MANIFEST_FILE, f"not readable ({error})"))
    try:
        rows = [json.loads(line) for line in (root / REJECTS_FILE).read_text().splitlines()]
        if len(rows) != counts["rejected"] + counts["duplicate"]:
            problems.append(Problem(REJECTS_FILE, f"{len(rows)} rows, dataset.json counts otherwise"))
    except (OSError, ValueError, KeyError) as error:
        problems.append(Problem(REJECTS_FILE, f"not readable ({error})"))
    return problems


def check_shard(task: ShardTask) -> list[Problem]:
    """Everything that is wrong with one shard; runs in a worker. A remote one is fetched for as long as that takes."""
    name = str(task.entry["name"])
    try:
        with local_copy(Path(task.root), name) as folder:
            return _check_shard(replace(task, root=str(folder)), name)
    except ShardError as error:
        return [Problem(name, str(error))]


def _check_shard(task: ShardTask, name: str) -> list[Problem]:
    path = Path(task.root) / name
    if not path.is_file():
        return [Problem(name, "is missing; restore it or pack again")]
    problems = []
    if path.stat().st_size != task.entry["bytes"]:
        problems.append(Problem(name, f"{path.stat().st_size} bytes, {task.entry['bytes']} were written"))
    if file_digest(path) != task.entry["digest"]:
        problems.append(Problem(name, "its content is not what was written (digest differs)"))
    if not task.indexed:
        return problems
    try:
        table = {member: (offset, size) for member, offset, size in members(path)}
    except ShardError as error:
        return [*problems, Problem(name, f"not a readable shard ({error})")]
    index = ShardIndex.open(task.root)
    shard = [one.name for one in index.shards].index(name)
    rows = np.flatnonzero(index.column("shard") == shard)
    used: set[str] = set()
    reader = ShardReader()
    decoders = {"raw": RawDecoder(reader)}
    usual = PyavDecoder(reader)
    places = _Members(table)
    for row in rows.tolist():
        where = f"{name}: record {row}"
        try:
            record = index[row]
            where = f"{name}: {record.key}"
            found = [Problem(where, what) for what in _record(record, reader, places, used)]
            if not found and task.decode:
                decoder = decoders.get(record.codec.codec, usual)
                found = [Problem(where, what) for what in _frames(record, decoder)]
        except ValueError as error:
            found = [Problem(where, str(error))]
        problems += found
    problems += [Problem(name, f"member {member} belongs to no record") for member in sorted(table.keys() - used)]
    if len(rows) != task.entry["records"]:
        problems.append(Problem(name, f"{len(rows)} records in the index, {task.entry['records']} in dataset.json"))
    reader.close()
    return problems


class _Members:
    """Members of a shard by name and by place."""

    def __init__(self, table: dict[str, tuple[int, int]]) -> None:
        self.table = table
        self._starts = sorted((offset, size, name) for name, (offset, size) in table.items())

    def around(self, first: int, end: int) -> str:
        """The member whose payload holds bytes [first, end), or nothing."""
        place = bisect(self._starts, (first, 1 << 62)) - 1
        if place < 0:
            return ""
        offset, size, name = self._starts[place]
        return name if end <= offset + size else ""


def _record(record: VideoRecord, reader: Reader, places: _Members, used: set[str]) -> Iterator[str]:
    """What is wrong with one record's bytes."""
    stem = ""
    sizes = record.packet_sizes
    if record.num_frames:
        end = record.packet_offset + int(sizes.sum(dtype=np.int64))
        home = places.around(record.packet_offset, end)
        if not home:
            yield "its packets do not lie inside one member"
            return
        used.add(home)
        stem = home.rpartition(".")[0]
        shown = np.sort(record.presentation) if len(record.presentation) else np.arange(len(sizes))
        if len(sizes) != record.num_frames or (shown != np.arange(record.num_frames)).any():
            yield f"{len(sizes)} packets for {record.num_frames} frames"
        keys = record.keyframes
        if not len(keys) or keys[0] != 0 or (np.diff(keys.astype(np.int64)) <= 0).any() or keys[-1] >= len(sizes):
            yield "its table of key frames is damaged"
        try:
            for first in range(0, len(sizes), _PACKETS):
                reader.packets(record, first, min(first + _PACKETS, len(sizes)))
        except ShardError as error:
            yield str(error)
    if record.num_samples:
        start, size = record.audio_offset - HEADER_BYTES, HEADER_BYTES + 2 * record.num_samples
        member = places.around(start, start + size)
        if not member.endswith(".wav") or places.table[member] != (start, size):
            yield "its sound is not one member of the shard"
            return
        used.add(member)
        if stem and member != f"{stem}.wav":
            yield f"its sound is called {member}, not {stem}.wav"
        stem = stem or member.rpartition(".")[0]
        if reader.read(record.shard, start, HEADER_BYTES) != wav_header(record.num_samples, record.audio_hz):
            yield "the header of its sound is altered"
        yield from _sound(record, reader)
    if content_digest(record) != record.digest:
        yield "its entry in the index and its digest disagree"
    offset, size = places.table.get(f"{stem}.json", (0, 0))
    used.add(f"{stem}.json")
    try:
        key = json.loads(reader.read(record.shard, offset, size)).get("key")
    except (ValueError, AttributeError):
        key = None
    if key != record.key:
        yield f"{stem}.json is missing, damaged or of another record"


def _sound(record: VideoRecord, reader: Reader) -> Iterator[str]:
    blocks = -(-record.num_samples // AUDIO_BLOCK)
    if len(record.audio_crcs) != blocks:
        yield f"{len(record.audio_crcs)} checksums for {blocks} blocks of sound"
        return
    for block, crc in enumerate(record.audio_crcs.tolist()):
        first = block * AUDIO_BLOCK
        count = min(AUDIO_BLOCK, record.num_samples - first)
        if zlib.crc32(reader.read(record.shard, record.audio_offset + 2 * first, 2 * count)) != crc:
            yield f"its sound is altered in block {block}"


def _frames(record: VideoRecord, decoder: Decoder) -> Iterator[str]:
    if not record.num_frames:
        return
    seen = 0

    def count(_: int, __: object) -> None:
        nonlocal seen
        seen += 1

    try:
        decoder.decode(record, range(record.num_frames), count)
    except (DecodeError, ShardError, UnsupportedCodecError) as error:
        yield str(error)
    else:
        if seen != record.num_frames:
            yield f"{seen} frames decode, {record.num_frames} are promised"
