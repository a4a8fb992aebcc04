"""Data sets on a web server, on S3 and in memory: the same batches as from files, and what is read for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.pipeline import storage as storage_module
from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.decode.runs import runs
from clipmill.pipeline.loader import DamageBudgetError, Loader, LoaderConfig
from clipmill.pipeline.log import Clock
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import RemoteReader, extents, open_reader
from clipmill.pipeline.shard import ShardError, ShardReader, file_digest
from clipmill.pipeline.shard_cache import ShardCache
from clipmill.pipeline.spec import AudioSpec, Flip, Normalize, RandomResizedCrop, VideoSpec
from clipmill.pipeline.storage import StorageError
from clipmill.pipeline.views import Clips, View

pytest.importorskip("aiohttp")

THREADS = LoaderConfig(threads=2, processes=0)
CROP = VideoSpec(size=24, crop=RandomResizedCrop(), ops=(Flip(), Normalize()))
VIDEO = View(name="v", num_frames=8, stride=2, augment=CROP)
SOUND = View(name="s", modality="audio", duration_s=0.5, augment=AudioSpec())
BOTH = Clips(views=(VIDEO, SOUND))


# --- the servers --------------------------------------------------------------------------------------------


@dataclass
class Web:
    """A web server for a folder, with byte ranges, that counts and can misbehave.

    bodies: {file name: bytes sent}. most: requests for shards that were in work at once. delay_s: before every answer.
    fail: called with (file name, number of the request for it); its answer is a status to send instead. cut: bytes to
    leave out of bodies of shards; lie: with a Content-Length that promises them. ranges: honour them.
    """

    root: Path
    url: str = ""
    delay_s: float = 0.0
    fail: Callable[[str, int], int | None] = lambda name, number: None
    cut: int = 0
    lie: bool = False
    ranges: bool = True
    bodies: Counter = field(default_factory=Counter)
    requests: Counter = field(default_factory=Counter)
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        name = handler.path.rpartition("/")[2]
        shard = name.endswith(".tar")
        with self.lock:
            self.requests[name] += 1
            number = self.requests[name]
            self.now += shard
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay_s)
            self._send(handler, name, number, body)
        finally:
            with self.lock:
                self.now -= shard

    def _send(self, handler: BaseHTTPRequestHandler, name: str, number: int, body: bool) -> None:
        path = self.root / name
        status = self.fail(name, number) or (200 if path.is_file() else 404)
        data = path.read_bytes() if status == 200 else b""
        size = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if status == 200 and asked and self.ranges:
            data = data[int(asked[1]) : int(asked[2]) + 1]
            status = 206 if data else 416
        promised = len(data)
        if self.cut and name.endswith(".tar"):
            data = data[: -self.cut]
        handler.send_response(status)
        handler.send_header("Content-Length", str((promised if self.lie else len(data)) if body else size))
        handler.end_headers()
        if body:
            with self.lock:
                self.bodies[name] += len(data)
            with contextlib.suppress(ConnectionError):  # a client may give up
                handler.wfile.write(data)
        if self.lie:
            handler.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Web]]:
    """serve(folder): a web server for it."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(root: Path) -> Web:
        web = Web(root)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                web.answer(self, body=True)

            def do_HEAD(self) -> None:
                web.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        running.append((server, thread))
        web.url = f"http://127.0.0.1:{server.server_address[1]}/set"
        return web

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))


def describe(root: Path) -> None:
    """Write the dataset.json that `pack` writes, as far as it matters here."""
    index = ShardIndex.open(root)
    shards = [{"name": path.name, "bytes": path.stat().st_size} for path in index.shards]
    about = {"digest": index.digest, "shards": shards, "files": {"index.arrow": file_digest(root / "index.arrow")}}
    (root / "dataset.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def packed(make_dataset, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """12 videos of 120 frames with sound, as `pack` would leave them."""
    root = tmp_path_factory.mktemp("packed")
    index = make_dataset(root, num_records=12, num_frames=120)
    describe(root)
    return index


@pytest.fixture
def web(serve, packed: ShardIndex) -> Web:
    return serve(packed.root)


def batches(index: ShardIndex, config: LoaderConfig = THREADS, planner=BOTH, epochs=(0, 1), **options):
    """All tensors of some epochs, and the loader."""
    found = []
    with Loader(index, planner, batch_size=4, seed=3, config=config, **options) as loader:
        for epoch in epochs:
            for batch in loader.epoch(epoch):
                found += [*batch.video.values(), *batch.audio.values(), batch.index]
    return found, loader


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the same as from files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_batches_over_http_are_those_of_files(packed, web, decoder):
    config = LoaderConfig(threads=2, processes=0, decoder=decoder)
    expected, _ = batches(packed, config)
    index = ShardIndex.open(web.url)
    assert index.digest == packed.digest
    assert index.url == web.url
    found, loader = batches(index, config)
    assert same(expected, found)
    assert loader.damaged == {}
    assert loader.stages.network_bytes == web.bodies["shard-00000.tar"]
    assert loader.stages.requests == web.requests["shard-00000.tar"]


def test_decode_processes_read_over_http(packed, web):
    config = LoaderConfig(threads=2, processes=1)
    found, loader = batches(ShardIndex.open(web.url), config, epochs=(0,))
    assert same(batches(packed, epochs=(0,))[0], found)
    assert loader.stages.network_bytes == web.bodies["shard-00000.tar"] > 0


def test_batches_from_memory_are_those_of_files(packed):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in packed.root.iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    found, _ = batches(ShardIndex.open("memory://set"))
    memory.rm("/set", recursive=True)
    assert same(batches(packed)[0], found)


def test_cached_frames_and_remote_shards_go_together(packed, web):
    config = LoaderConfig(threads=2, processes=0, cache_gb=0.2)
    found, loader = batches(ShardIndex.open(web.url), config)
    assert same(batches(packed)[0], found)
    assert loader.stages.clips_cached >= 12  # the whole second epoch
    size = int(sum(record.packet_sizes.sum() for record in packed))
    video = sum(Extents(packed, epoch).gaps for epoch in (0, 1))
    assert loader.stages.network_bytes <= size + video + sum(Extents(packed, epoch).sound for epoch in (0, 1))


# --- what is read -------------------------------------------------------------------------------------------


class Extents:
    """Bytes that the clips of an epoch need. packets: of the groups of pictures up to the last frame; gaps: between
    those; sound: whole blocks, as their checksums need; samples: of the sound alone."""

    def __init__(self, index: ShardIndex, epoch: int, planner=BOTH, batch: int = 4) -> None:
        from clipmill.pipeline.order import Order
        from clipmill.pipeline.slot import BatchPlanner, Job

        self.packets = self.gaps = self.sound = self.samples = 0
        order = Order(num_records=len(index), seed=3)
        for number in range(len(index) // batch):
            plan = BatchPlanner(index, planner).plan(Job(epoch, number * batch, batch, number), order, {})
            for record, drawn, targets in zip(plan.records, plan.drawn, plan.targets, strict=True):
                found = runs(record, np.unique(targets[:, 0]).tolist())
                sizes = record.packet_sizes.astype(np.int64)
                needed = sum(int(sizes[run.first : run.stop].sum()) for run in found)
                self.packets += needed
                self.gaps += int(sizes[found[0].first : found[-1].stop].sum()) - needed
                for span in drawn.spans:
                    low, high = max(span.start_sample, 0), min(span.start_sample + span.num_samples, record.num_samples)
                    if high > low:
                        blocks = range(low // AUDIO_BLOCK, (high - 1) // AUDIO_BLOCK + 1)
                        ends = [min((block + 1) * AUDIO_BLOCK, record.num_samples) for block in blocks]
                        self.sound += 2 * sum(end - b * AUDIO_BLOCK for b, end in zip(blocks, ends, strict=True))
                        self.samples += 2 * (high - low)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_only_the_bytes_of_the_clips_are_read(packed, web, stride):
    planner = Clips(views=(View(name="v", num_frames=16, stride=stride, augment=CROP), SOUND))
    _, loader = batches(ShardIndex.open(web.url), planner=planner, epochs=(0,))
    needed = Extents(packed, 0, planner)
    read = web.bodies["shard-00000.tar"]
    ratio = read / (needed.packets + needed.sound)
    print(f"stride {stride}: {read} bytes for {needed.packets} of packets, {needed.sound} of sound blocks: {ratio:.3f}")
    assert needed.packets + needed.sound <= read <= needed.packets + needed.gaps + needed.sound
    assert read - needed.sound < 1.1 * needed.packets
    assert 24 <= loader.stages.requests <= 24 * stride  # one at least for the pictures and one for the sound of a clip


def test_the_log_says_what_the_network_carried(packed, web):
    for index in (ShardIndex.open(web.url), packed):
        with Loader(index, BOTH, batch_size=4, seed=3, config=LoaderConfig(threads=1, processes=0)) as loader:
            clock = Clock(loader, 4)
            for _ in loader.epoch(0):
                clock.tick()
            spent = clock.lap()
        if index is packed:
            assert "network_mb" not in spent
        else:
            assert spent["network_mb"] == web.bodies["shard-00000.tar"] / 1e6 > 0
            assert spent["requests"] == loader.stages.requests > 0


def test_what_is_not_foreseen_is_fetched_when_it_is_read(packed, web):
    index = ShardIndex.open(web.url)
    with closing(open_reader(index)) as reader, closing(ShardReader()) as files:
        assert isinstance(reader, RemoteReader)
        theirs, ours = index[3], packed[3]
        expected = files.packets(ours, 10, 40)
        assert reader.packets(theirs, 10, 40) == expected
        assert np.array_equal(reader.samples(theirs, -50, 20000), files.samples(ours, -50, 20000))
        with reader.ahead(theirs, extents(theirs, list(range(12, 21)), [])):
            before = web.bodies["shard-00000.tar"]
            assert reader.packets(theirs, 9, 20) == files.packets(ours, 9, 20)
            assert web.bodies["shard-00000.tar"] == before
            assert reader.packets(theirs, 0, 20) == files.packets(ours, 0, 20)
            assert web.bodies["shard-00000.tar"] > before
        with pytest.raises(ShardError, match=r"ends before byte \d+ that the index names"):
            reader.read(theirs.shard, 0, 1 << 40)


def test_reads_go_ahead_of_decoding_but_not_without_bound(packed, serve):
    web = serve(packed.root)
    index = ShardIndex.open(web.url)
    web.delay_s = 0.05
    config = LoaderConfig(threads=1, processes=0, ahead=2)
    with Loader(index, BOTH, batch_size=4, seed=3, repeat=8, config=config) as loader:
        stream = loader.epoch(0)
        next(stream)
        time.sleep(0.5)  # nobody takes a batch
        held = web.requests["shard-00000.tar"]
        start_s = time.perf_counter()
        rest = sum(1 for _ in stream)
        wall_s = time.perf_counter() - start_s
    assert held <= (1 + 1 + config.ahead + 1) * 4 * 2  # delivered, waiting on the device, in the ring
    asked = web.requests["shard-00000.tar"] - held
    assert rest == 23
    assert 8 <= web.most <= storage_module.CONNECTIONS
    print(f"{asked} requests of {web.delay_s} s in {wall_s:.2f} s, at most {web.most} at once")
    assert wall_s < asked * web.delay_s / 4


# --- the cache on the disk ----------------------------------------------------------------------------------


def used(folder: Path) -> int:
    """Bytes on the disk; files and folders may leave while it looks."""
    blocks = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                blocks += (Path(at) / name).stat().st_blocks * (name != "size")
    return blocks * 512


def test_what_was_read_once_comes_from_the_disk(packed, web):
    index = ShardIndex.open(web.url)
    config = LoaderConfig(threads=2, processes=0, shard_cache_gb=0.1)
    found, _ = batches(index, replace(config, processes=1))
    cold = web.bodies["shard-00000.tar"]
    assert cold <= sum(Extents(packed, epoch).packets + Extents(packed, epoch).sound for epoch in (0, 1)) * 1.1
    again, loader = batches(index, config)
    assert same(batches(packed)[0], found)
    assert same(found, again)
    assert web.bodies["shard-00000.tar"] == cold
    assert (loader.stages.requests, loader.stages.network_bytes) == (0, 0)


def test_altered_bytes_of_the_cache_are_fetched_again(packed, web):
    index = ShardIndex.open(web.url)
    config = LoaderConfig(threads=2, processes=0, shard_cache_gb=0.1)
    found, _ = batches(index, config, epochs=(0,))
    cold = web.bodies["shard-00000.tar"]
    files = list((index.root / "bytes").glob("*/*"))
    assert len(files) == 12
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # as after a loss of power
        path.write_bytes(data)
    again, loader = batches(index, config, epochs=(0,))
    assert same(found, again)
    assert loader.damaged == {}
    assert 0 < web.bodies["shard-00000.tar"] - cold < cold
    assert web.bodies["shard-00000.tar"] - cold == loader.stages.network_bytes


def test_the_cache_keeps_its_budget_and_the_smallest_hashes(packed, web):
    index = ShardIndex.open(web.url)
    batches(index, LoaderConfig(threads=2, processes=0, shard_cache_gb=1.0))
    whole = used(index.root / "bytes")
    budget = whole // 2
    config = LoaderConfig(threads=2, processes=0, shard_cache_gb=budget / 2**30)
    with closing(ShardCache(index.root / "bytes", budget)) as cache:  # lowered: shrinks when it is opened
        assert cache.size == used(index.root / "bytes") <= budget
    sizes = []
    with Loader(index, BOTH, batch_size=4, seed=3, config=config) as loader:
        for epoch in range(4):
            sizes += [used(index.root / "bytes") for _ in loader.epoch(epoch)]
    assert max(sizes) <= budget
    assert sizes[-1] > 0.5 * budget
    names = sorted(path.name for path in (index.root / "bytes").glob("*/*"))
    uids = sorted(f"{uid:016x}" for uid in index.column("uid").tolist())
    assert 3 <= len(names) < 12
    assert set(uids[: len(names) // 2]) <= set(names)  # records are kept in parts of different size, so not exactly
    assert len(set(names) - set(uids[: len(names) + 2])) <= 1


FILL = """
import os, signal, sys, threading
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import extents
from clipmill.pipeline.shard import ShardReader
from clipmill.pipeline.shard_cache import ShardCache
index, folder, budget, kill = ShardIndex.open(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
cache, reader = ShardCache(Path(folder), budget), ShardReader()
for turn in range(40):
    for record in index:
        frames = list(range(turn, turn + 20))
        parts = [(one.offset, reader.read(record.shard, one.offset, one.size)) for one in extents(record, frames, [])]
        cache.put(record, parts)
        if kill and turn == 1 and record.index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_share_the_cache_and_may_be_killed(packed, tmp_path):
    folder, budget = tmp_path / "bytes", 96 << 10
    command = [sys.executable, "-c", FILL, str(packed.root), str(folder), str(budget)]
    running = [subprocess.Popen([*command, kill]) for kill in "010"]
    most = 0
    while any(process.poll() is None for process in running):
        most = max(most, used(folder) if folder.is_dir() else 0)
    assert [process.wait() for process in running] == [0, -9, 0]
    assert 0 < most <= budget
    with closing(ShardCache(folder, budget)) as cache, closing(ShardReader()) as reader:
        assert 0 < cache.size == used(folder) <= budget
        here = 0
        for record in packed:
            (extent,) = extents(record, list(range(8, 24)), [])
            data, missing = cache.get(record, extent)
            for start, stop in missing:
                data[start:stop] = reader.read(record.shard, extent.offset + start, stop - start)
            assert bytes(data) == reader.read(record.shard, extent.offset, extent.size)
            here += not missing
        assert here > 0


# --- faults -------------------------------------------------------------------------------------------------


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("status", [503, 500, 429])
def test_passing_faults_change_nothing(packed, web, status):
    web.fail = lambda name, number: status if number <= (30 if name.endswith(".tar") else 2) else None
    found, loader = batches(ShardIndex.open(web.url))
    assert same(batches(packed)[0], found)
    assert loader.damaged == {}
    assert web.requests["shard-00000.tar"] == loader.stages.requests + 30


@pytest.mark.usefixtures("_hasty")
def test_broken_connections_are_tried_again_and_then_one_error(packed, web):
    index = ShardIndex.open(web.url)
    web.cut, web.lie = 10, True
    with pytest.raises(StorageError, match=r"shard-00000\.tar: failed 5 times, the last: .*; check network"):
        batches(index)
    assert web.requests["shard-00000.tar"] <= 5 * storage_module.CONNECTIONS


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    ("status", "message"),
    [(503, "failed 5 times, the last: .*503"), (403, "access refused .*403.*; check URL and credentials")],
)
def test_lasting_faults_stop_the_loader_with_one_error(web, status, message):
    index = ShardIndex.open(web.url)
    web.fail = lambda name, number: status
    with pytest.raises(StorageError, match=rf"^{re.escape(web.url)}/shard-00000\.tar: {message}"):
        batches(index)
    with pytest.raises(StorageError, match=rf"^{re.escape(web.url)}/dataset\.json: {message}"):
        ShardIndex.open(web.url)


@pytest.mark.usefixtures("_hasty")
def test_errors_reach_the_parent_of_a_decode_process(web):
    index = ShardIndex.open(web.url)
    web.fail = lambda name, number: 403
    with pytest.raises(StorageError, match=r"shard-00000\.tar: access refused"):
        batches(index, LoaderConfig(threads=1, processes=1))


@pytest.mark.usefixtures("_hasty")
def test_a_server_that_hangs_or_is_not_there_is_one_error(web, monkeypatch):
    index = ShardIndex.open(web.url)
    monkeypatch.setattr(storage_module, "_TIMEOUT_S", 0.1)
    web.delay_s = 1.0
    start_s = time.perf_counter()
    with pytest.raises(StorageError, match=r"failed 5 times, the last: \w*Timeout"):
        batches(index)
    assert time.perf_counter() - start_s < 5
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/set/dataset\.json: failed 5 times"):
        ShardIndex.open("http://127.0.0.1:9/set")


def test_damaged_shards_are_damaged_records(packed, serve, tmp_path):
    shutil.copytree(packed.root, tmp_path / "set")
    web = serve(tmp_path / "set")
    index = ShardIndex.open(web.url)
    shard = tmp_path / "set" / "shard-00000.tar"
    good = shard.read_bytes()
    place = packed[5].packet_offset + 20
    shard.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    planner = Clips(views=(View(name="v", num_frames=120, augment=CROP),))
    lenient = LoaderConfig(threads=2, processes=0, max_damaged=0.5)
    found, loader = batches(index, lenient, planner)
    local = ShardIndex.open(tmp_path / "set")
    expected, loader_there = batches(local, lenient, planner)
    assert same(expected, found)
    assert list(loader.damaged) == list(loader_there.damaged) == [5]
    assert loader.damaged[5] == f"{web.url}/shard-00000.tar: packet 0 of 'video/5' is altered (checksum differs)"

    shard.write_bytes(good[: packed[11].packet_offset + 500])
    _, loader = batches(index, lenient, planner)
    ends = "ends before the bytes that the index promises; upload the data set again"
    assert loader.damaged == {11: f"{web.url}/shard-00000.tar: {ends}"}
    shard.unlink()
    with pytest.raises(
        DamageBudgetError,
        match=rf"{web.url}/shard-00000\.tar: is not there; check the URL, or upload the whole data set",
    ):
        batches(index)


def test_what_cannot_be_opened_is_one_clear_error(packed, serve, tmp_path):
    shutil.copytree(packed.root, tmp_path / "set")
    web = serve(tmp_path / "set")
    about = (tmp_path / "set" / "dataset.json").read_text()
    with pytest.raises(StorageError, match=r"[Pp]rotocol not known.*; give a folder, or a URL that fsspec opens"):
        ShardIndex.open("nonsense://host/set")
    with pytest.raises(StorageError, match="without a query"):
        ShardIndex.open(f"{web.url}?key=1")
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(StorageError, match=r"dataset\.json: damaged"):
        ShardIndex.open(web.url)
    (tmp_path / "set" / "dataset.json").write_text(about.replace('"index.arrow": "', '"index.arrow": "0'))
    with pytest.raises(StorageError, match=r"index\.arrow: not the file that dataset\.json there names"):
        ShardIndex.open(web.url)
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"dataset\.json: is not there; check the URL"):
        ShardIndex.open(web.url)
    (tmp_path / "set" / "dataset.json").write_text(about)
    web.ranges = False
    with pytest.raises(StorageError, match=r"must support byte ranges"):
        ShardIndex.open(web.url)
    web.ranges = True
    assert ShardIndex.open(web.url).digest == packed.digest


# --- opening ------------------------------------------------------------------------------------------------

OPEN = """
import sys
from clipmill.pipeline.record import ShardIndex
print(ShardIndex.open(sys.argv[1]).root)
"""


def test_processes_that_open_at_once_fetch_the_index_once(web):
    web.delay_s = 0.1
    running = [subprocess.Popen([sys.executable, "-c", OPEN, web.url], stdout=subprocess.PIPE) for _ in range(3)]
    roots = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(roots) == 1
    assert web.bodies["index.arrow"] == (web.root / "index.arrow").stat().st_size


def test_a_data_set_that_was_replaced_is_opened_anew(packed, make_dataset, serve, tmp_path):
    shutil.copytree(packed.root, tmp_path / "set")
    web = serve(tmp_path / "set")
    before = ShardIndex.open(web.url)
    batches(before, LoaderConfig(threads=1, processes=0, shard_cache_gb=0.1), epochs=(0,))
    assert ShardIndex.open(web.url).root == before.root
    assert (before.root / "bytes").is_dir()
    shutil.rmtree(tmp_path / "set")
    new = make_dataset(tmp_path / "set", num_records=4, num_frames=30)
    describe(tmp_path / "set")
    after = ShardIndex.open(web.url)
    assert (after.digest, len(after)) == (new.digest, 4)
    assert after.root != before.root
    assert not (before.root / "bytes").exists()  # nobody can need it again


LEAVE = """
import sys
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import extents, open_reader
index = ShardIndex.open(sys.argv[1])
reader = open_reader(index)
with reader.ahead(index[0], extents(index[0], [3, 4], [(0, 100)])):
    reader.packets(index[0], 0, 4)
if sys.argv[2] == "close":
    reader.close()
"""


@pytest.mark.parametrize("how", ["close", "leave"])
def test_connections_are_closed(web, how):
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", LEAVE, web.url, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- S3 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(packed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3-compatible server that holds the data set as s3://corpora/set."""
    pytest.importorskip("s3fs")
    pytest.importorskip("flask")
    pytest.importorskip("moto.server")
    import fsspec

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        options = {"key": "k", "secret": "s", "endpoint_url": endpoint, "skip_instance_cache": True}
        bucket = fsspec.filesystem("s3", **options)
        bucket.mkdir("corpora")
        for path in packed.root.iterdir():
            bucket.pipe(f"corpora/set/{path.name}", path.read_bytes())
        del bucket
        yield endpoint
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def _s3_here(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_s3_here")
def test_batches_from_s3_are_those_of_files(packed):
    index = ShardIndex.open("s3://corpora/set")
    config = LoaderConfig(threads=2, processes=0, shard_cache_gb=0.1)
    found, loader = batches(index, replace(config, processes=1), epochs=(0,))
    assert same(batches(packed, epochs=(0,))[0], found)
    needed = Extents(packed, 0)
    print(f"S3: {loader.stages.network_bytes} bytes in {loader.stages.requests} requests")
    assert needed.packets + needed.sound <= loader.stages.network_bytes
    assert loader.stages.network_bytes <= needed.packets + needed.gaps + needed.sound
    again, loader = batches(index, config, epochs=(0,))
    assert same(found, again)
    assert loader.stages.network_bytes == 0


@pytest.mark.usefixtures("_s3_here", "_hasty")
def test_faults_of_s3_are_one_clear_error(monkeypatch):
    with pytest.raises(ShardError, match=r"s3://nobody/set/dataset\.json: is not there"):
        ShardIndex.open("s3://nobody/set")
    with pytest.raises(ShardError, match=r"s3://corpora/other/dataset\.json: is not there"):
        ShardIndex.open("s3://corpora/other")
    index = ShardIndex.open("s3://corpora/set")
    with closing(open_reader(index)) as reader, pytest.raises(ShardError, match="ends before the bytes"):
        reader._storage.read("dataset.json", 10, 1 << 20)
    with closing(open_reader(index)) as reader, pytest.raises(ShardError, match="ends before the bytes"):
        reader._storage.read("dataset.json", 1 << 20, 2 << 20)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"dataset\.json: .*[Cc]redentials"):
        ShardIndex.open("s3://corpora/set")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    start_s = time.perf_counter()
    with pytest.raises(StorageError, match=r"dataset\.json: failed 5 times, the last: Could not connect"):
        ShardIndex.open("s3://corpora/set")
    print(f"an endpoint that is not there: {time.perf_counter() - start_s:.1f} s")
