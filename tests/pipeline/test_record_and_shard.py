import os
import pickle
import shutil
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pytest

from clipmill.pipeline.record import LISTS, IndexFormatError, ShardIndex
from clipmill.pipeline.shard import ShardError, ShardReader, ShardWriter, members


def test_records_round_trip(dataset):
    assert len(dataset) == 6
    record = dataset[4]
    assert (record.index, record.key, record.num_frames, record.label) == (4, "video/4", 44, 1)
    assert record.codec.codec == "h264"
    assert record.codec.extradata
    assert record.duration_s == pytest.approx(44 / 25)
    assert [one.key for one in dataset] == [f"video/{i}" for i in range(6)]
    assert dataset.column("packet_sizes").tolist() == [40, 41, 42, 43, 44, 45]
    assert dataset.classes == ["class0", "class1", "class2"]


def test_selection_keeps_rows_and_has_its_own_digest(dataset):
    test = dataset.split("test")
    assert [record.key for record in test] == ["video/0", "video/3"]
    assert test[1].index == 1
    assert test.select(np.array([1]))[0].key == "video/3"
    assert len({dataset.digest, test.digest, dataset.select(np.array([3, 0])).digest}) == 3
    copy = pickle.loads(pickle.dumps(test))
    assert copy.digest == test.digest
    with pytest.raises(ValueError, match="no split 'val'"):
        dataset.split("val")
    with pytest.raises(IndexError, match="record 2 of 2"):
        test[2]


def test_index_is_mapped_not_loaded(dataset):
    before = pa.total_allocated_bytes()
    index = ShardIndex.open(dataset.root)
    assert index[5].num_frames == 45
    assert pa.total_allocated_bytes() - before < 4096


def test_lists_of_a_large_index_are_read_and_not_mapped(dataset, tmp_path, monkeypatch):
    mapped = list(dataset)
    copy = tmp_path / "index.arrow"
    shutil.copy(dataset.root / "index.arrow", copy)
    monkeypatch.setattr("clipmill.pipeline.record._MOSTLY_MAPPED", 0)
    index = ShardIndex.open(tmp_path)
    for one, other in zip(index, mapped, strict=True):
        for name in LISTS:
            assert getattr(one, name).dtype == np.uint32
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert pickle.loads(pickle.dumps(index.select(np.array([4]))))[0].packet_sizes.tolist() == [*mapped[4].packet_sizes]
    np.testing.assert_array_equal(index.column("packet_sizes"), dataset.column("packet_sizes"))
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(20):
        ShardIndex.open(tmp_path)
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files + 4
    os.truncate(copy, 0)
    with pytest.raises(IndexFormatError, match="cut off while in use"):
        index._batches[0].lists["packet_sizes"][1][0:3]


def test_columns_that_point_out_of_the_file_are_refused(dataset, tmp_path):
    good = bytearray((dataset.root / "index.arrow").read_bytes())
    with pa.ipc.open_file(dataset.root / "index.arrow") as reader:
        body = reader.get_batch(0).column("packet_sizes").buffers()[1].size.to_bytes(8, "little")
    refused, place = 0, good.find(body)
    while place >= 8:  # where a buffer of this size is described, its offset is in the 8 bytes before (Message.fbs)
        bad = bytearray(good)
        bad[place - 2] = 0x40
        (tmp_path / "index.arrow").write_bytes(bad)
        try:
            index = ShardIndex.open(tmp_path)
        except IndexFormatError:
            refused += 1
        else:
            assert [record.num_frames for record in index] == [record.num_frames for record in dataset]
        place = good.find(body, place + 1)
    assert refused


def test_a_large_index_must_not_be_compressed(dataset, tmp_path, monkeypatch):
    with pa.ipc.open_file(dataset.root / "index.arrow") as reader:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(tmp_path / "index.arrow"), reader.schema, options=options) as writer:
            writer.write_batch(reader.get_batch(0))
    monkeypatch.setattr("clipmill.pipeline.record._MOSTLY_MAPPED", 0)
    with pytest.raises(IndexFormatError, match="compressed"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "version"])
def test_bad_index_is_one_clear_error(dataset, tmp_path, damage):
    good = (dataset.root / "index.arrow").read_bytes()
    path = tmp_path / "index.arrow"
    if damage == "text":
        path.write_text("not arrow")
    elif damage == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "version":
        with pa.ipc.open_file(dataset.root / "index.arrow") as reader:
            meta = dict(reader.schema.metadata or {}) | {b"clipmill.schema_version": b"99"}
            with pa.ipc.new_file(str(path), reader.schema.with_metadata(meta)) as writer:
                writer.write_batch(reader.get_batch(0))
    with pytest.raises(IndexFormatError, match=str(tmp_path)):
        ShardIndex.open(tmp_path)


def test_packets_are_the_bytes_of_the_member(dataset):
    record = dataset[2]
    packets = ShardReader().packets(record, 0, record.num_frames)
    assert [zlib.crc32(p) for p in packets] == record.packet_crcs.tolist()
    with tarfile.open(record.shard) as tar:
        payload = tar.extractfile("00000002.mp4").read()  # type: ignore[union-attr]
    assert b"".join(packets) in payload


def test_samples_are_exact_and_zero_outside(dataset):
    record = dataset[1]
    reader = ShardReader()
    whole = reader.samples(record, 0, record.num_samples)
    tone = np.sin(2 * np.pi * 250 * np.arange(record.num_samples) / 16000) * 8000
    assert np.array_equal(whole, tone.astype(np.int16))
    part = reader.samples(record, -100, 300)
    assert not part[:100].any()
    assert np.array_equal(part[100:], whole[:200])
    end = reader.samples(record, record.num_samples - 50, 120)
    assert np.array_equal(end[:50], whole[-50:])
    assert not end[50:].any()
    assert not reader.samples(record, record.num_samples + 5, 10).any()


def altered(dataset, tmp_path, offset):
    for name in ("index.arrow", "shard-00000.tar"):
        data = bytearray((dataset.root / name).read_bytes())
        if name.endswith("tar"):
            data[offset] ^= 1
        (tmp_path / name).write_bytes(data)
    return ShardIndex.open(tmp_path)


def test_one_flipped_bit_of_a_packet_or_of_sound_is_caught(dataset, tmp_path):
    record = dataset[0]
    index = altered(dataset, tmp_path, record.packet_offset + 10)
    with pytest.raises(ShardError, match="packet 0 of 'video/0' is altered"):
        ShardReader().packets(index[0], 0, 4)
    index = altered(dataset, tmp_path, record.audio_offset + 10)
    with pytest.raises(ShardError, match="sound of 'video/0' is altered"):
        ShardReader().samples(index[0], 0, 100)


def test_truncated_and_missing_shards(dataset, tmp_path):
    record = dataset[5]
    (tmp_path / "index.arrow").write_bytes((dataset.root / "index.arrow").read_bytes())
    index = ShardIndex.open(tmp_path)
    with pytest.raises(ShardError, match="cannot be opened"):
        ShardReader().packets(index[5], 0, 1)
    data = (dataset.root / "shard-00000.tar").read_bytes()
    (tmp_path / "shard-00000.tar").write_bytes(data[: record.packet_offset + 5])
    with pytest.raises(ShardError, match="truncated"):
        ShardReader().packets(index[5], 0, 1)
    with pytest.raises(ShardError, match="truncated"):
        ShardReader().read(index[5].shard, 2**63, 16)


def test_writer_is_deterministic_atomic_and_readable_by_tarfile(tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            offset = writer.add("00000001.json", b"{}" * 300)
            assert not (tmp_path / name).exists()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes()[offset : offset + 4] == b"{}{}"
    assert list(members(tmp_path / "a")) == [("00000001.json", offset, 600)]

    with pytest.raises(ValueError, match="member name"), ShardWriter(tmp_path / "c") as writer:
        writer.add("not a name", b"1")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("name", ["../x.mp4", "/etc/x.mp4", "a/b.mp4", "x\n.mp4", "x"])
def test_hostile_member_names_are_refused(tmp_path, name):
    with ShardWriter(tmp_path / "ok") as writer, pytest.raises(ValueError, match="member name"):
        writer.add(name, b"")
    with tarfile.open(tmp_path / "bad", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match="not one that clipmill writes"):
        list(members(tmp_path / "bad"))


def test_many_shards_keep_few_files_open(tmp_path):
    import os

    reader = ShardReader()
    for i in range(100):
        (tmp_path / str(i)).write_bytes(bytes([i] * 8))
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(100), *range(100)]:
        assert reader.read(str(tmp_path / str(i)), 4, 2) == bytes([i, i])
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before
