"""Results to shards: one shard at a time, complete or not there, and at the end the files of the data set.

While a data set is being made its folder holds finished shards and ``.pack`` with everything else. A shard counts once
``.pack/done/<shard>`` exists, which appears by one rename, after the shard itself did.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipmill import __version__
from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.index_file import merge_indexes, write_index
from clipmill.pipeline.pack.audio import HEADER_BYTES
from clipmill.pipeline.pack.outcome import Picture, Result, Sound
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import INDEX_FILE, SCHEMA_VERSION, VideoRecord, uid_of
from clipmill.pipeline.shard import ShardWriter, file_digest

WORK_FOLDER = ".pack"
DATASET_FILE = "dataset.json"
REJECTS_FILE = "rejects.jsonl"
MANIFEST_FILE = "manifest.parquet"
_ROWS_FILE = "rows.jsonl"
_SHARD_FILE = "shard.json"

_U32 = np.empty(0, np.uint32)
_NO_PICTURE = Picture(
    path="", suffix="", codec=CodecConfig(codec="none"), num_frames=0, fps=Fraction(1), height=0, width=0,
    first_packet=0, sizes=_U32, crcs=_U32, presentation=_U32, keyframes=_U32, psnr_db=0.0, psnr_min_db=0.0,
)  # fmt: skip
_NO_SOUND = Sound(path="", num_samples=0, audio_hz=0, crcs=_U32, silent=False)

MANIFEST = pa.schema([
    ("key", pa.string()), ("uid", pa.uint64()), ("shard", pa.string()), ("member", pa.string()),
    ("source", pa.string()), ("split", pa.string()), ("label", pa.int32()), ("class", pa.string()),
    ("labels", pa.list_(pa.int32())),
    ("status", pa.string()), ("reason", pa.string()), ("detail", pa.string()),
    ("num_frames", pa.uint32()), ("fps", pa.float64()), ("height", pa.uint32()), ("width", pa.uint32()),
    ("duration_s", pa.float64()), ("num_samples", pa.uint64()), ("audio_hz", pa.uint32()), ("silent", pa.bool_()),
    ("video_bytes", pa.uint64()), ("audio_bytes", pa.uint64()), ("psnr_db", pa.float64()),
    ("psnr_min_db", pa.float64()),
    ("source_bytes", pa.uint64()), ("source_digest", pa.string()), ("container", pa.string()),
    ("video_codec", pa.string()), ("source_width", pa.uint32()), ("source_height", pa.uint32()),
    ("source_fps", pa.string()), ("pix_fmt", pa.string()), ("matrix", pa.string()), ("full_range", pa.bool_()),
    ("turn", pa.string()), ("sar", pa.string()), ("deinterlaced", pa.bool_()), ("origin_s", pa.float64()),
    ("constant_rate", pa.bool_()), ("repeated", pa.uint32()), ("dropped", pa.uint32()),
    ("audio_codec", pa.string()), ("audio_source_hz", pa.uint32()), ("audio_layout", pa.string()),
    ("audio_gaps", pa.uint32()), ("audio_gap_s", pa.float64()), ("extra", pa.string()),
])  # fmt: skip


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.tar"


def done_folder(out: Path, number: int) -> Path:
    """Exists when shard ``number`` is finished."""
    return out / WORK_FOLDER / "done" / f"{number:05d}"


@dataclass(frozen=True, slots=True)
class Row:
    """One source of a shard and what became of it. name: its path as it is recorded."""

    number: int
    source: Source
    name: str
    result: Result


def write_shard(out: Path, number: int, rows: Sequence[Row], corpus: Corpus) -> Counter[str]:
    """Write one shard and its part of the index; payload files are removed. Returns counts by status and bytes.

    Nothing is visible before all of it is; a shard without records is only noted as finished.
    """
    name = shard_name(number)
    packed = [row for row in rows if row.result.status != "rejected"]
    records: list[VideoRecord] = []
    manifest: list[dict[str, Any]] = []
    if packed:
        with ShardWriter(out / name) as writer:
            for row in packed:
                records.append(_add(writer, name, row))
                writer.add(f"{row.number:08d}.json", json.dumps(_facts(row, corpus)).encode())
                manifest.append(_manifest_row(row, records[-1], corpus))
    done = done_folder(out, number)
    part = done.with_name(f"{number:05d}.partial")
    part.mkdir(parents=True)
    write_index(part / INDEX_FILE, records, [name] if packed else [], corpus.classes)
    _write_lines(part / _ROWS_FILE, manifest)
    rejected = [row for row in rows if row.result.status == "rejected"]
    _write_lines(part / REJECTS_FILE, (_reject(row) for row in rejected))
    counts = Counter(row.result.status for row in rows)
    size = (out / name).stat().st_size if packed else 0
    shard = (
        {"name": name, "digest": file_digest(out / name), "bytes": size, "records": len(records)} if packed else None
    )
    write_json(part / _SHARD_FILE, {"shard": shard, "counts": counts})
    sync_folder(out)
    sync_folder(part)
    part.replace(done)
    sync_folder(done.parent)
    for row in packed:
        for track in (row.result.picture, row.result.sound):
            if track is not None:
                Path(track.path).unlink()
    return counts + Counter(bytes=size)


def finish(out: Path, shards: Sequence[int], duplicates: Sequence[Row], corpus: Corpus, about: dict[str, Any]) -> None:
    """Merge the parts of all shards into the data set's files; ``dataset.json``, the last, makes it one."""
    parts = [done_folder(out, number) for number in shards]
    facts = [json.loads((part / _SHARD_FILE).read_text()) for part in parts]
    counts = Counter({"ok": 0, "salvaged": 0, "rejected": len(corpus.missing), "duplicate": len(duplicates)})
    for one in facts:
        counts.update(one["counts"])
    work = out / WORK_FOLDER
    digest, records = merge_indexes(work / INDEX_FILE, parts)
    _write_manifest(work / MANIFEST_FILE, parts)
    rejects = [json.loads(line) for part in parts for line in _lines(part / REJECTS_FILE)]
    rejects += [_reject(row) | {"number": row.number} for row in duplicates]
    rejects.sort(key=lambda row: row["number"])
    missing = [{"key": key, "path": "", "reason": "missing", "detail": why} for key, why in corpus.missing]
    rejects = [{name: row[name] for name in ("key", "path", "reason", "detail")} for row in rejects]
    _write_lines(work / REJECTS_FILE, [*rejects, *missing])
    dataset = {
        "schema_version": SCHEMA_VERSION,
        "records": records,
        "counts": dict(counts),
        "digest": digest,
        "classes": list(corpus.classes),
        "shards": [one["shard"] for one in facts if one["shard"]],
        "files": {name: file_digest(work / name) for name in (INDEX_FILE, MANIFEST_FILE, REJECTS_FILE)},
    }
    write_json(work / DATASET_FILE, about | dataset)
    for name in (INDEX_FILE, MANIFEST_FILE, REJECTS_FILE, DATASET_FILE):
        sync_file(work / name)
        (work / name).replace(out / name)
        sync_folder(out)


def about_settings(settings: PackSettings) -> dict[str, Any]:
    """What dataset.json says about how it was made."""
    versions = {"clipmill": __version__, "av": av.__version__, "ffmpeg": av.ffmpeg_version_info}
    shown = settings.to_json()
    return {"profile": shown.pop("profile"), "audio_hz": settings.audio_hz, "settings": shown, "versions": versions}


def _add(writer: ShardWriter, shard: str, row: Row) -> VideoRecord:
    """Append the payloads of one source and describe where they went."""
    stem, source = f"{row.number:08d}", row.source
    picture, sound = row.result.picture or _NO_PICTURE, row.result.sound or _NO_SOUND
    packets = wave = 0
    if picture.num_frames:
        packets = writer.add_file(stem + picture.suffix, Path(picture.path)) + picture.first_packet
    if sound.num_samples:
        wave = writer.add_file(stem + ".wav", Path(sound.path)) + HEADER_BYTES
    record = VideoRecord(
        index=0,
        uid=uid_of(source.key),
        key=source.key,
        shard=shard,
        codec=picture.codec,
        num_frames=picture.num_frames,
        fps=picture.fps,
        height=picture.height,
        width=picture.width,
        packet_offset=packets,
        packet_sizes=picture.sizes,
        packet_crcs=picture.crcs,
        presentation=picture.presentation,
        keyframes=picture.keyframes,
        audio_offset=wave,
        num_samples=sound.num_samples,
        audio_hz=sound.audio_hz,
        audio_crcs=sound.crcs,
        silent=sound.silent,
        salvaged=row.result.status == "salvaged",
        label=source.label,
        split=source.split,
        source=row.name,
        digest=b"",
    )
    return replace(record, digest=content_digest(record))


def content_digest(record: VideoRecord) -> bytes:
    """BLAKE2b-128 over everything that decides which frames and samples a record gives, but not over where they lie."""
    codec = record.codec
    facts = (
        record.num_frames, str(record.fps), record.height, record.width, codec.codec, codec.extradata, codec.pix_fmt,
        codec.matrix, codec.full_range, record.num_samples, record.audio_hz, record.silent, record.salvaged,
    )  # fmt: skip
    state = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name in ("packet_sizes", "packet_crcs", "presentation", "keyframes", "audio_crcs"):
        column = np.ascontiguousarray(getattr(record, name), "<u4")
        state.update(len(column).to_bytes(8, "little") + column.tobytes())
    return state.digest()


def _class(corpus: Corpus, label: int) -> str:
    return corpus.classes[label] if 0 <= label < len(corpus.classes) else ""


def _facts(row: Row, corpus: Corpus) -> dict[str, Any]:
    """The record's JSON."""
    source, result = row.source, row.result
    facts: dict[str, Any] = {
        "key": source.key,
        "source": row.name,
        "split": source.split,
        "label": source.label,
        "class": _class(corpus, source.label),
        "labels": list(source.labels),
        "part_s": [source.start_s, source.end_s],
        "extra": dict(source.extra),
        "status": result.status,
        "reason": result.reason,
        "detail": result.detail,
    }
    if result.picture is not None:
        facts["psnr_db"] = round(result.picture.psnr_db, 2)
        facts["psnr_min_db"] = round(result.picture.psnr_min_db, 2)
    return facts | result.facts


def _manifest_row(row: Row, record: VideoRecord, corpus: Corpus) -> dict[str, Any]:
    facts = row.result.facts
    origin, timing = facts.get("origin", {}), facts.get("timing", {})
    video, audio = origin.get("video", facts.get("video", {})), facts.get("sound", {})
    normalised, gaps = facts.get("normalised", {}), audio.get("gaps", [])
    picture = row.result.picture or _NO_PICTURE
    return {
        "key": record.key, "uid": record.uid, "shard": record.shard, "member": f"{row.number:08d}",
        "source": record.source, "split": record.split, "label": record.label, "class": _class(corpus, record.label),
        "labels": list(row.source.labels), "status": row.result.status, "reason": row.result.reason,
        "detail": row.result.detail, "num_frames": record.num_frames, "fps": float(record.fps), "height": record.height,
        "width": record.width, "duration_s": record.duration_s, "num_samples": record.num_samples,
        "audio_hz": record.audio_hz, "silent": record.silent, "video_bytes": int(record.packet_sizes.sum()),
        "audio_bytes": 2 * record.num_samples, "psnr_db": round(picture.psnr_db, 2),
        "psnr_min_db": round(picture.psnr_min_db, 2), "source_bytes": origin.get("bytes", 0),
        "source_digest": origin.get("digest", ""),
        "container": origin.get("container", facts.get("container", "")), "video_codec": video.get("codec", ""),
        "source_width": video.get("width", 0), "source_height": video.get("height", 0),
        "source_fps": timing.get("source_fps", ""), "pix_fmt": normalised.get("pix_fmt", ""),
        "matrix": normalised.get("matrix", ""), "full_range": normalised.get("full_range", False),
        "turn": str(normalised.get("turn", "")), "sar": normalised.get("sar", "1"),
        "deinterlaced": normalised.get("deinterlaced", False), "origin_s": timing.get("origin_s", 0.0),
        "constant_rate": timing.get("constant", True), "repeated": timing.get("repeated", 0),
        "dropped": timing.get("dropped", 0), "audio_codec": audio.get("codec", ""),
        "audio_source_hz": audio.get("hz", 0), "audio_layout": audio.get("layout", ""), "audio_gaps": len(gaps),
        "audio_gap_s": round(sum(length for _, length in gaps), 6), "extra": json.dumps(dict(row.source.extra)),
    }  # fmt: skip


def _reject(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "number": row.number,
        "key": row.source.key,
        "path": row.name,
        "reason": result.reason,
        "detail": result.detail,
    }


def _write_manifest(path: Path, parts: Iterable[Path]) -> None:
    with pq.ParquetWriter(str(path), MANIFEST, compression="zstd") as writer:
        for part in parts:
            rows = [json.loads(line) for line in _lines(part / _ROWS_FILE)]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, MANIFEST))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as file:
        yield from file


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    sync_file(path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that is complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", "ascii")
    sync_file(partial)
    partial.replace(path)


def sync_file(path: Path) -> None:
    """Force a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
