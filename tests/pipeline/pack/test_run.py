"""From a corpus to a data set: shards, index, lists, duplicates, odd names, resumption and what must not happen."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.decode.pyav import PyavDecoder
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.pack.engine_local import LocalEngine
from clipmill.pipeline.pack.run import PackError, pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardReader

TINY = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "0"}
ODD_NAMES = ["plain", "with blank", "ünï", "u\u0308 decomposed", "#%?&", "new\nline", "-dash", "x" * 200]


def tree(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def corpus_of(paths, root, **facts):
    rows = [
        Source(key=str(path.relative_to(root).with_suffix("")), path=str(path), label=number % 2, split="train")
        for number, path in enumerate(paths)
    ]
    return Corpus(sources=tuple(rows), classes=("even", "odd"), **facts)


@pytest.fixture
def media(kit):
    """A folder of small films, pictures and sounds, some of them bad."""
    root = kit.folder / "media"
    root.mkdir()
    paths = []
    for number, name in enumerate(ODD_NAMES):
        paths.append(
            kit.film(f"media/{name}.mp4", frames=10 + number, options=TINY, sound=kit.clicks(0.5, [0.1], 16000))
        )
    paths.append(kit.film("media/sound.wav", frames=0, sound=kit.clicks(1.0, [0.5], 16000)))
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(root / "picture.png")
    (root / "text.mp4").write_text("no video")
    (root / "copy.mp4").write_bytes(paths[0].read_bytes())
    os.mkfifo(root / "pipe.mp4")
    return root, [*paths, root / "picture.png", root / "text.mp4", root / "copy.mp4", root / "pipe.mp4"]


def pack_here(corpus, out, root, **facts):
    settings = PackSettings(**{"shard_clips": 4, **facts})
    return pack(corpus, out, settings, root=root, workers=2, timeout_s=60, memory_gb=2)


def test_the_data_set_holds_what_the_corpus_does(kit, media):
    root, paths = media
    out = kit.folder / "packed"
    corpus = corpus_of(paths, root, missing=(("row 7", "no such file"),))
    summary = pack_here(corpus, out, root)
    assert summary.counts == {"ok": 10, "salvaged": 0, "rejected": 3, "duplicate": 1}
    assert summary.reasons == {"missing": 1, "not_media": 1, "not_a_file": 1, "duplicate": 1}
    names = {"dataset.json", "index.arrow", "manifest.parquet", "rejects.jsonl"}
    assert set(tree(out)) == names | {f"shard-0000{n}.tar" for n in range(3)}
    index = ShardIndex.open(out)
    assert [record.key for record in index] == [*ODD_NAMES, "sound", "picture"]
    assert index.classes == ["even", "odd"]
    reader = ShardReader()
    decoder = PyavDecoder(reader)
    for number, record in enumerate(index):
        assert record.label == number % 2
        assert record.source == str(paths[number].relative_to(root))
        seen = {}
        if record.num_frames:
            decoder.decode(record, range(record.num_frames), lambda n, yuv, seen=seen: seen.update({n: yuv[0].copy()}))
        if number < len(ODD_NAMES):
            assert record.num_frames == 10 + number
            assert record.num_samples == record.num_frames * 640
            levels = [round((float(np.median(seen[n])) - 16) / 2) for n in range(record.num_frames)]
            assert levels == list(range(record.num_frames))
            wave = reader.samples(record, 0, record.num_samples)
            assert abs(int(np.abs(wave.astype(int)).argmax()) - 1600) <= 1
    assert (index[8].num_frames, index[8].num_samples) == (0, 16000)
    assert (index[9].num_frames, index[9].num_samples, index[9].codec.codec) == (1, 0, "mjpeg")
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rejects] == [
        ("text", "not_media"), ("copy", "duplicate"), ("pipe", "not_a_file"), ("row 7", "missing"),
    ]  # fmt: skip
    assert "plain" in rejects[1]["detail"]
    assert audit(out, LocalEngine(workers=1, timeout_s=60, memory_gb=2), decode=True) == []


def test_shards_are_plain_tars_and_the_lists_agree(kit, media):
    root, paths = media
    out = kit.folder / "packed"
    pack_here(corpus_of(paths, root), out, root)
    dataset = json.loads((out / "dataset.json").read_text())
    index = ShardIndex.open(out)
    assert dataset["digest"] == index.digest
    assert dataset["classes"] == ["even", "odd"]
    assert (dataset["profile"], dataset["audio_hz"], dataset["settings"]["gop"]) == ("cpu", 16000, 8)
    assert [entry["records"] for entry in dataset["shards"]] == [4, 4, 2]
    manifest = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [row["key"] for row in manifest] == [record.key for record in index]
    with tarfile.open(out / "shard-00001.tar") as tar:
        assert tar.getnames() == [f"{n:08d}.{kind}" for n in range(4, 8) for kind in ("mp4", "wav", "json")]
        facts = json.load(tar.extractfile("00000005.json"))
        payload = tar.extractfile("00000005.mp4").read()
    (kit.folder / "one.mp4").write_bytes(payload)
    again = kit.pack(kit.folder / "one.mp4")  # anyone can read it
    assert again.picture.num_frames == 15
    assert facts["key"] == manifest[5]["key"] == ODD_NAMES[5]
    assert (facts["class"], facts["status"], facts["timing"]["constant"]) == ("odd", "ok", True)
    assert manifest[5]["psnr_db"] == facts["psnr_db"] > 35
    assert facts["origin"]["bytes"] == paths[5].stat().st_size


def test_neither_workers_nor_repetition_change_a_byte(kit, media):
    root, paths = media
    corpus = corpus_of(paths, root)
    for workers in (1, 2):
        pack(corpus, kit.folder / f"w{workers}", PackSettings(shard_clips=4), root=root, workers=workers)
    assert tree(kit.folder / "w1") == tree(kit.folder / "w2")
    before = {path: path.stat().st_mtime_ns for path in (kit.folder / "w1").iterdir()}
    again = pack(corpus, kit.folder / "w1", PackSettings(shard_clips=4), root=root)
    assert again.already
    assert {path: path.stat().st_mtime_ns for path in (kit.folder / "w1").iterdir()} == before


def test_other_settings_or_sources_for_the_same_folder_are_an_error(kit, media):
    root, paths = media
    out = kit.folder / "packed"
    pack_here(corpus_of(paths[:3], root), out, root)
    before = tree(out)
    with pytest.raises(PackError, match="gop = 8, not 4"):
        pack_here(corpus_of(paths[:3], root), out, root, gop=4)
    with pytest.raises(PackError, match="3 then, 4 now"):
        pack_here(corpus_of(paths[:4], root), out, root)
    (kit.folder / "mine").mkdir()
    (kit.folder / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(PackError, match="holds something else"):
        pack_here(corpus_of(paths[:3], root), kit.folder / "mine", root)
    assert tree(out) == before
    assert (kit.folder / "mine" / "letter.txt").read_text() == "keep me"


def test_nothing_is_left_when_nothing_can_be_packed(kit, media):
    root, paths = media
    bad = [path for path in paths if path.stem in ("text", "pipe")]
    with pytest.raises(PackError, match="1 not_media, 1 not_a_file"):
        pack_here(corpus_of(bad, root), kit.folder / "packed", root)
    assert not (kit.folder / "packed").exists()
    with pytest.raises(ValueError, match="no source"):
        pack_here(Corpus(sources=()), kit.folder / "packed", root)
    assert not (kit.folder / "packed").exists()


def test_parts_of_one_file_are_no_duplicates(kit):
    path = kit.film("a.mp4", frames=30)
    rows = [Source(key=f"{n}", path=str(path), start_s=n * 0.4, end_s=n * 0.4 + 0.4) for n in range(3)]
    rows.append(Source(key="3", path=str(path), start_s=0.0, end_s=0.4))
    summary = pack_here(Corpus(sources=tuple(rows)), kit.folder / "packed", None)
    assert summary.counts == {"ok": 3, "salvaged": 0, "rejected": 0, "duplicate": 1}
    assert [record.num_frames for record in ShardIndex.open(kit.folder / "packed")] == [10, 10, 10]


def test_shards_end_at_a_number_of_bytes_too(kit, media):
    root, paths = media
    size = max(path.stat().st_size for path in paths[:8])
    pack_here(corpus_of(paths[:8], root), kit.folder / "packed", root, shard_clips=100, shard_gb=2.5 * size / 1e9)
    records = Counter(Path(record.shard).name for record in ShardIndex.open(kit.folder / "packed"))
    assert sum(records.values()) == 8
    assert 1 <= max(records.values()) <= 3
    assert len(records) >= 3


def test_a_file_that_takes_too_long_is_rejected_and_the_rest_is_packed(kit, media):
    root, paths = media
    slow = kit.film(
        "media/slow.mkv", frames=3, times=[0, 36 * 3600 * 25, 36 * 3600 * 25 + 1]
    )  # millions of frames at 1000 Hz
    corpus = corpus_of([slow, *paths[:2]], root)
    settings = PackSettings(fps=Fraction(1000))
    summary = pack(corpus, kit.folder / "packed", settings, workers=1, timeout_s=4, memory_gb=2)
    assert summary.counts["ok"] == 2
    assert summary.reasons == {"timeout": 1}


def test_progress_counts_every_source(kit, media):
    root, paths = media
    calls = []
    corpus = corpus_of(paths[:6], root)
    pack(corpus, kit.folder / "packed", PackSettings(shard_clips=2), on_progress=lambda *numbers: calls.append(numbers))
    assert calls[0] == (0, 6, 0, 0, 0)
    assert calls[-1][:4] == (6, 6, 6, 0)
    assert calls[-1][4] == sum(path.stat().st_size for path in (kit.folder / "packed").glob("*.tar"))


COMMAND = [sys.executable, "-m", "clipmill.tools.cli"]
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
from clipmill.tools.cli import main
sys.exit(main())
"""


def test_a_full_disk_is_one_clear_error_and_can_be_resumed(kit, media):
    """A limit on file sizes stands for the disk; it is met by the worker or by the shard."""
    root, _ = media
    (root / "pipe.mp4").unlink()
    out, arguments = kit.folder / "packed", ["--shard-clips", "4", "--workers", "1"]
    for limit in (4_000, 40_000):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED.format(limit), "pack", str(root), str(out), *arguments],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert "too large" in done.stderr.lower() or "file size" in done.stderr.lower()
        assert not list(out.glob("*.partial"))
        assert not list(out.glob(".pack/run-*"))
        assert not (out / "dataset.json").exists()
    subprocess.run([*COMMAND, "pack", str(root), str(out), *arguments], check=True, capture_output=True)
    subprocess.run(
        [*COMMAND, "pack", str(root), str(kit.folder / "other"), *arguments], check=True, capture_output=True
    )
    assert tree(out) == tree(kit.folder / "other")


def children(pid):
    """Process ids of the children of a process, and whether they still run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(one) for one in found.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("instants", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_ends_with_the_same_bytes(kit, media, instants):
    """kill -9 of the command; its workers end with it, and the same command finishes what it began."""
    root, _ = media
    for number in range(6):
        kit.film(f"media/more-{number}.mp4", frames=30 + number, options=TINY)
    arguments = ["--shard-clips", "3", "--workers", "2"]
    start_s = time.monotonic()
    subprocess.run(
        [*COMMAND, "pack", str(root), str(kit.folder / "whole"), *arguments], check=True, capture_output=True
    )
    whole_s = time.monotonic() - start_s
    expected = tree(kit.folder / "whole")
    killed, ended = 0, 0
    for share in np.random.default_rng(instants).uniform(0.4, 1.0, instants):
        out = kit.folder / f"killed-{share:.3f}"
        process = subprocess.Popen(
            [*COMMAND, "pack", str(root), str(out), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(share * whole_s)
        workers = children(process.pid)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        until_s = time.monotonic() + 20
        while any(map(is_running, workers)) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert not any(map(is_running, workers))
        ended += len(workers)
        subprocess.run([*COMMAND, "pack", str(root), str(out), *arguments], check=True, capture_output=True)
        assert tree(out) == expected
    assert killed >= 1
    assert ended >= 1


def test_two_packs_do_not_write_into_one_folder(kit, media):
    root, paths = media
    out = kit.folder / "packed"
    (out / ".pack").mkdir(parents=True)
    with (out / ".pack" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PackError, match="another `clipmill pack`"):
            pack_here(corpus_of(paths[:2], root), out, root)
    assert pack_here(corpus_of(paths[:2], root), out, root).counts["ok"] == 2


class Stop(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_any_step_of_writing_it_ends_with_the_same_bytes(kit, media, monkeypatch, after):
    """Every change that becomes visible is one rename: stop before or after each of them."""
    root, paths = media
    corpus = corpus_of([*paths[:2], root / "text.mp4", root / "copy.mp4"], root)

    def here(run_task, tasks):
        for task in tasks:
            yield task, run_task(task)

    def run(out):
        pack(corpus, out, PackSettings(shard_clips=1), root=root, engine=here)

    rename = Path.replace
    steps = 0

    def counted(path, target):
        nonlocal steps
        steps += 1
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    run(kit.folder / "whole")
    expected, total = tree(kit.folder / "whole"), steps
    assert total >= 14
    for number in range(1, total + 1):
        steps = 0

        def stopping(path, target, number=number):
            nonlocal steps
            steps += 1
            if steps == number and not after:
                raise Stop
            rename(path, target)
            if steps == number:
                raise Stop

        monkeypatch.setattr(Path, "replace", stopping)
        out = kit.folder / f"stopped-{number}"
        with pytest.raises(Stop):
            run(out)
        monkeypatch.setattr(Path, "replace", rename)
        run(out)
        assert tree(out) == expected
