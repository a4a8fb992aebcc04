"""`verify`: a data set that is as it was written has no problem, and every altered byte is one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.pack.engine import Failure
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import data_folder
from clipmill.pipeline.shard import file_digest
from clipmill.tools import cli


def here(run_task, tasks):
    """An engine in this process."""
    for task in tasks:
        yield task, run_task(task)


@pytest.fixture
def packed(kit):
    """A packed data set of two shards."""
    paths = [kit.film(f"{n}.mp4", frames=12 + n, sound=kit.clicks(0.5, [0.1], 16000)) for n in range(3)]
    Image.new("RGB", (32, 32), (90, 9, 9)).save(kit.folder / "p.png")
    (kit.folder / "bad.mp4").write_text("no video")
    rows = [Source(key=path.stem, path=str(path)) for path in [*paths, kit.folder / "p.png", kit.folder / "bad.mp4"]]
    pack(Corpus(sources=tuple(rows)), kit.folder / "packed", PackSettings(shard_clips=2), workers=1)
    return kit.folder / "packed"


def problems(root, decode=False):
    found = audit(root, here, decode=decode)
    return {problem.where for problem in found}, " | ".join(problem.what for problem in found)


def alter(path, place, value=None):
    data = bytearray(path.read_bytes())
    data[place] = data[place] ^ 0x55 if value is None else value
    path.write_bytes(data)


def forge(root):
    """Make dataset.json agree with the shards as they are now, as somebody with access could."""
    dataset = json.loads((root / "dataset.json").read_text())
    for entry in dataset["shards"]:
        entry["digest"] = file_digest(root / entry["name"])
        entry["bytes"] = (root / entry["name"]).stat().st_size
    (root / "dataset.json").write_text(json.dumps(dataset))


def test_nothing_is_wrong_with_what_was_just_written(packed):
    assert problems(packed) == (set(), "")
    assert problems(packed, decode=True) == (set(), "")


def test_a_data_set_at_a_url_is_checked_like_its_folder(packed, tmp_path, capfd):
    url, cache = f"file://{packed}", tmp_path / "cache"
    root = data_folder(url, cache_dir=cache, also=("manifest.parquet", "rejects.jsonl"))
    assert ShardIndex.open(root).url == url
    assert problems(root, decode=True) == (set(), "")
    command = ["verify", url, "--cache-dir", str(cache), "--workers", "1"]
    assert cli.main(command) == 0
    assert capfd.readouterr().out == f"{url}: no problem found\n"
    alter(packed / "shard-00000.tar", ShardIndex.open(packed)[0].packet_offset)
    where, what = problems(root)
    assert where == {"shard-00000.tar", f"shard-00000.tar: {ShardIndex.open(packed)[0].key}"}
    assert "altered" in what
    (packed / "shard-00001.tar").unlink()
    assert cli.main([*command, "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert f"{url}/shard-00001.tar: is not there; check the URL, or upload the whole data set" in str(found["problems"])
    assert not list(root.glob("verify-*"))


def test_any_altered_byte_of_a_shard_is_found(packed):
    shard = packed / "shard-00000.tar"
    whole = shard.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        alter(shard, place)
        where, what = problems(packed)
        assert any(one.startswith("shard-00000.tar") for one in where), place
        assert "digest differs" in what
        shard.write_bytes(whole)
    assert problems(packed) == (set(), "")


def test_altered_payloads_are_found_even_when_the_digest_was_forged(packed):
    first = ShardIndex.open(packed)[0]
    shard = packed / "shard-00000.tar"
    whole = shard.read_bytes()
    key = whole.index(b'"key": "0"')
    for place, expected in (
        (first.packet_offset + 5, "packet 0 of '0' is altered"),
        (first.packet_offset + int(first.packet_sizes.sum()) - 1, "packet 11 of '0' is altered"),
        (first.audio_offset + 2 * first.num_samples - 1, "sound is altered in block 0"),
        (first.audio_offset - 44 + 24, "header of its sound"),
        (key + 8, "damaged or of another record"),
        (257, "not a readable"),
    ):
        alter(shard, place)
        forge(packed)
        where, what = problems(packed)
        assert where
        assert expected in what
        shard.write_bytes(whole)
        forge(packed)
    assert problems(packed) == (set(), "")


def test_missing_cut_and_foreign_shards(packed):
    shard = packed / "shard-00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5000])
    assert "were written" in problems(packed)[1]
    shard.unlink()
    assert problems(packed) == ({"shard-00001.tar"}, "is missing; restore it or pack again")
    shard.write_bytes(whole)
    shutil.copy(shard, packed / "shard-00007.tar")
    assert problems(packed) == ({"shard-00007.tar"}, "is not listed in dataset.json")


def test_a_member_that_no_record_owns(packed):
    shard = packed / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b"00000001.wav")
    header = data[place : place + 512]
    header[0:8], header[148:156] = b"00000009", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[place : place + 512] = header
    shard.write_bytes(data)
    forge(packed)
    where, _ = problems(packed)
    assert where  # the sound now lies in a member of another name


@pytest.mark.parametrize("name", ["index.arrow", "manifest.parquet", "rejects.jsonl"])
def test_damaged_lists_are_found(packed, name):
    whole = (packed / name).read_bytes()
    (packed / name).write_bytes(whole[: len(whole) // 2])
    assert name in problems(packed)[0]
    (packed / name).unlink()
    assert name in problems(packed)[0]


def test_an_altered_index_is_found(packed):
    path = packed / "index.arrow"
    whole = path.read_bytes()
    sizes = ShardIndex.open(packed)[1].packet_sizes.tobytes()
    alter(path, whole.index(sizes) + 4)
    assert problems(packed)[0]
    path.write_bytes(whole)
    offset = ShardIndex.open(packed)[1].packet_offset.to_bytes(8, "little")
    alter(path, whole.index(offset) + 1)
    assert problems(packed)[0]


def test_what_is_not_a_data_set(packed, tmp_path):
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        audit(tmp_path, here)
    (tmp_path / "begun" / ".pack").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not finished"):
        audit(tmp_path / "begun", here)
    dataset = json.loads((packed / "dataset.json").read_text())
    (packed / "dataset.json").write_text(json.dumps(dataset | {"schema_version": 99}))
    assert "schema version 99" in problems(packed)[1]
    (packed / "dataset.json").write_text("{")
    assert problems(packed)[0] == {"dataset.json"}


def test_a_shard_whose_check_dies_is_a_problem(packed):
    def dying(run_task, tasks):
        for task in tasks:
            yield task, Failure("crash", "its process died (SIGSEGV)")

    found = audit(packed, dying)
    assert [problem.where for problem in found] == ["shard-00000.tar", "shard-00001.tar"]
