"""Data sets made by somebody who means harm: names in tars, indexes and lists cannot lead out of their folder."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.record import IndexFormatError, ShardIndex
from clipmill.pipeline.shard import ShardError, ShardReader, ShardWriter, members

OUTSIDE = ["../secret.tar", "/etc/passwd", "a/../../secret.tar", "..", ".", "", "a\0b", "sub/shard-00000.tar"]


def here(run_task, tasks):
    for task in tasks:
        yield task, run_task(task)


def hostile_tar(path, name, kind=tarfile.REGTYPE, target=""):
    """A tar with one harmless member and one of this name and kind."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for one, what in (("00000000.json", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(one)
            info.type, info.linkname = what, target
            info.size = 4 if what == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil"))
    return path


@pytest.mark.parametrize(
    "name", ["../evil.json", "/tmp/evil.json", "a/../../evil", "./x.json", "a b.json", "\n.json", ".."]
)
def test_member_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    path = hostile_tar(tmp_path / "shard-00000.tar", name)
    with pytest.raises(ShardError, match="not one that clipmill writes"):
        list(members(path))
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["shard-00000.tar"]
    with pytest.raises(ValueError, match="member name"), ShardWriter(tmp_path / "new.tar") as writer:
        writer.add(name, b"evil")
    assert not (tmp_path / "new.tar").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path, kind):
    path = hostile_tar(tmp_path / "shard-00000.tar", "link.json", kind, "/etc/passwd")
    with pytest.raises(ShardError, match="not one that clipmill writes"):
        list(members(path))


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_name_a_shard_elsewhere(tmp_path, dataset, name):
    secret = tmp_path / "secret.tar"
    secret.write_bytes(b"secret" * 100)
    root = tmp_path / "set"
    root.mkdir()
    records = [replace_shard(record, name) for record in dataset]
    write_index(root / "index.arrow", records, [name], dataset.classes)
    with pytest.raises(IndexFormatError, match="no name of a shard"):
        ShardIndex.open(root)


def replace_shard(record, name):
    return replace(record, shard=name, **{text: getattr(record, text) for text in ("key", "source", "split", "digest")})


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_verify_does_not_follow_a_list_out_of_the_folder(tmp_path, dataset, name):
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "secret.tar").write_bytes(b"secret")
    entry = {"name": name, "digest": "", "bytes": 6, "records": 0}
    counts = {"ok": 0, "salvaged": 0, "rejected": 0, "duplicate": 0}
    data = {"schema_version": 1, "shards": [entry], "counts": counts, "digest": ""}
    (root / "dataset.json").write_text(json.dumps(data))
    (problem,) = audit(root, here)
    assert problem.where == "dataset.json"
    assert "outside its folder" in problem.what


def test_a_damaged_size_does_not_ask_for_memory(tmp_path, dataset):
    record = dataset[0]
    with pytest.raises(ShardError, match="truncated"):
        ShardReader().read(record.shard, 0, 1 << 50)
    assert Path(record.shard).stat().st_size < 1 << 30
