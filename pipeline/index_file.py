"""Writing the index of a data set, and joining several into one. `clipmill.pipeline.record` reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.record import FIELDS, INDEX_FILE, LISTS, SCHEMA, SCHEMA_VERSION, ShardIndex, VideoRecord

_ROWS_PER_BATCH = 1 << 16


def index_digest(records: Iterable[VideoRecord]) -> str:
    """The digest stored with an index: over keys, labels, splits, positions and content digests of all records."""
    state = hashlib.blake2b(digest_size=8)
    for record in records:
        head = (record.key, record.split, record.label, record.num_frames, record.packet_offset, record.audio_offset)
        state.update(repr(head).encode("utf-8", "surrogateescape") + record.digest)
    return state.hexdigest()


def _schema_with(
    shards: Sequence[str], codecs: Sequence[CodecConfig], classes: Sequence[str], digest: str
) -> pa.Schema:
    meta = {
        "clipmill.schema_version": str(SCHEMA_VERSION),
        "clipmill.shards": json.dumps(list(shards)),
        "clipmill.codecs": json.dumps([codec.to_json() for codec in codecs]),
        "clipmill.classes": json.dumps(list(classes)),
        "clipmill.digest": digest,
    }
    return SCHEMA.with_metadata(meta)


def write_index(path: Path, records: Sequence[VideoRecord], shards: Sequence[str], classes: Sequence[str]) -> str:
    """Write records to one Arrow IPC file and return its digest.

    records: their ``shard`` must be one of ``shards`` (names relative to the data set's folder). classes: names by
    label number. The bytes are a pure function of the arguments.
    """
    codecs = list(dict.fromkeys(record.codec for record in records))
    codec_number = {codec: i for i, codec in enumerate(codecs)}
    shard_number = {name: i for i, name in enumerate(shards)}
    digest = index_digest(records)
    schema = _schema_with(shards, codecs, classes, digest)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(records), _ROWS_PER_BATCH):
            rows = records[start : start + _ROWS_PER_BATCH]
            columns = [_column(name, kind, rows, shard_number, codec_number) for name, kind in FIELDS]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return digest


def merge_indexes(path: Path, parts: Sequence[Path]) -> tuple[str, int]:
    """Join the indexes of several folders into one file, in order; returns its digest and number of records.

    parts: folders as for `ShardIndex.open`, each of which may name shards of its own; all have the same classes. The
    result is what `write_index` would have written for all records, but it never holds more than one batch of them.
    """
    indexes = [ShardIndex.open(part) for part in parts]
    shards = list(dict.fromkeys(name for index in indexes for name in index._shards))
    codecs = list(dict.fromkeys(codec for index in indexes for codec in index._codecs))
    digest = index_digest(record for index in indexes for record in index)
    classes = indexes[0].classes if indexes else []
    schema = _schema_with(shards, codecs, classes, digest)
    waiting: list[pa.RecordBatch] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for index in indexes:
            shard_of = np.array([shards.index(name) for name in index._shards], np.uint32)
            codec_of = np.array([codecs.index(codec) for codec in index._codecs], np.uint32)
            with pa.memory_map(str(index.root / INDEX_FILE)) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number)
                    for name, new in (("shard", shard_of), ("codec", codec_of)):
                        place = batch.schema.get_field_index(name)
                        column = pa.array(new[batch.column(name).to_numpy()])
                        batch = batch.set_column(place, SCHEMA.field(name), column)
                    waiting.append(batch)
            while sum(batch.num_rows for batch in waiting) >= _ROWS_PER_BATCH:
                waiting = _write_rows(writer, schema, waiting, _ROWS_PER_BATCH)
        if waiting:
            _write_rows(writer, schema, waiting, _ROWS_PER_BATCH)
    return digest, sum(len(index) for index in indexes)


def _write_rows(writer: Any, schema: pa.Schema, waiting: list[pa.RecordBatch], count: int) -> list[pa.RecordBatch]:
    """Write the first ``count`` rows as one batch and return the rest."""
    table = pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in waiting], SCHEMA)
    for batch in table.slice(0, count).combine_chunks().to_batches():
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return table.slice(count).to_batches()


def _column(name: str, kind: pa.DataType, rows: Sequence[VideoRecord], shards: dict, codecs: dict) -> pa.Array:
    if name in LISTS:
        values = [np.asarray(getattr(row, name), np.uint32) for row in rows]
        offsets = np.cumsum([0, *(len(value) for value in values)])
        flat = np.concatenate([np.empty(0, np.uint32), *values])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.uint32()))
    if name == "shard":
        return pa.array([shards[row.shard] for row in rows], kind)
    if name == "codec":
        return pa.array([codecs[row.codec] for row in rows], kind)
    if name in ("fps_num", "fps_den"):
        part = "numerator" if name == "fps_num" else "denominator"
        return pa.array([getattr(row.fps, part) for row in rows], kind)
    if name in ("silent", "salvaged"):
        return pa.array([int(getattr(row, name)) for row in rows], kind)
    return pa.array([getattr(row, name) for row in rows], kind)
