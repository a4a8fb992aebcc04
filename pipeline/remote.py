"""Data sets on object storage: a local folder with the index, and shards that are read by byte range.

`data_folder` turns a URL into a folder that holds the small files of the data set and says where its shards are.
Whatever opens a data set takes that folder like any other; only the reader differs. `RemoteReader` is told by the
planning thread what the clips of the next batches need, fetches it ahead of the decode threads, and hands it to the
decoders through the same methods as a `ShardReader`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, final

import numpy as np

from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.decode.decoder import DecodeError
from clipmill.pipeline.decode.runs import reads, runs
from clipmill.pipeline.record import INDEX_FILE, REMOTE_FILE, ShardIndex, VideoRecord, is_url, url_of
from clipmill.pipeline.shard import Reader, ShardError, ShardReader, file_digest, sound_blocks
from clipmill.pipeline.shard_cache import Extent, ShardCache
from clipmill.pipeline.storage import CONNECTIONS, Storage, StorageError

DATASET_FILE = "dataset.json"
_WASTE = 1 / 12  # a clip in more than one range costs requests, one range costs the packets that nobody decodes
_CACHE_FOLDER = "bytes"  # of shards, beside the index

# --- the folder of a URL ------------------------------------------------------------------------------------


def data_folder(data: str | Path, *, cache_dir: Path | None = None, also: Sequence[str] = ()) -> Path:
    """The folder of a data set that is named by a folder (returned as it is) or by a URL.

    For a URL: a folder below ``cache_dir`` with its index, fetched if the data set there is another one than last
    time. also: more of its files that are needed, e.g. ``manifest.parquet``. Default of ``cache_dir``:
    ``$CLIPMILL_CACHE``, else ``clipmill`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Raises StorageError, ShardError.
    """
    if not is_url(data):
        return Path(data)
    with closing(Storage(str(data))) as storage:
        stored = storage.read_all(DATASET_FILE)
        try:
            digests = dict(json.loads(stored)["files"])
        except (ValueError, LookupError, TypeError) as error:
            raise StorageError(
                f"{storage.url}/{DATASET_FILE}: damaged ({error!r}); upload the data set again"
            ) from error
        home = cache_folder(cache_dir) / _folder_name(storage.url)
        folder = home / blake2b(stored, digest_size=8).hexdigest()
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / "lock"):
            if not folder.is_dir():
                for old in home.glob(f"*/{_CACHE_FOLDER}"):  # of a data set that is no longer there
                    shutil.rmtree(old)
                _fetch_index(storage, stored, folder, digests)
            for name in also:
                if not (folder / name).is_file():
                    _fetch_file(storage, name, folder / name, digests)
    return folder


def _fetch_index(storage: Storage, stored: bytes, folder: Path, digests: dict[str, Any]) -> None:
    """Make the folder, all at once."""
    storage.read(DATASET_FILE, 0, 1)  # a server without ranges is found out before it sends whole shards
    partial = folder.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / DATASET_FILE).write_bytes(stored)
    (partial / REMOTE_FILE).write_text(json.dumps({"url": storage.url}))
    _fetch_file(storage, INDEX_FILE, partial / INDEX_FILE, digests)
    partial.replace(folder)


def _fetch_file(storage: Storage, name: str, path: Path, digests: dict[str, Any]) -> None:
    partial = path.with_name(f"{name}.partial")
    storage.download(name, partial)
    if file_digest(partial) != digests.get(name):
        partial.unlink()
        raise StorageError(
            f"{storage.url}/{name}: not the file that {DATASET_FILE} there names (digest differs); if an upload is "
            "under way wait for its end, else upload the data set again"
        )
    partial.replace(path)


def cache_folder(chosen: Path | None = None) -> Path:
    """Where things may be kept from one run to the next: ``chosen``, else the default that `data_folder` names."""
    if chosen is not None:
        return chosen
    named = os.environ.get("CLIPMILL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipmill"


def _folder_name(url: str) -> str:
    """A name that people can read and that no other URL has."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.rpartition("@")[2])[-60:].strip("-.")
    return f"{readable}-{blake2b(url.encode(), digest_size=4).hexdigest()}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes; those that wait find the work done."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shard_bytes(folder: Path) -> dict[str, int]:
    """Size of every shard by its name, as ``dataset.json`` has it."""
    try:
        listed = json.loads((folder / DATASET_FILE).read_text("utf-8"))["shards"]
        return {str(entry["name"]): int(entry["bytes"]) for entry in listed}
    except (ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{folder / DATASET_FILE}: damaged ({error!r}); remove {folder}") from error


@contextmanager
def local_copy(folder: Path, shard: str) -> Iterator[Path]:
    """A folder with the index and one shard of a remote data set, for a while; for a local one its own folder."""
    url = url_of(folder)
    if not url:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="verify-", dir=folder) as name, closing(Storage(url)) as storage:
        copy = Path(name)
        (copy / INDEX_FILE).symlink_to(folder.resolve() / INDEX_FILE)
        storage.download(shard, copy / shard)
        yield copy


# --- the reader ---------------------------------------------------------------------------------------------


def open_reader(index: ShardIndex, cache_gb: float = 0.0) -> Reader:
    """The reader for the shards of an index. cache_gb: GiB of local disk for bytes of remote shards."""
    return RemoteReader(index, cache_gb) if index.url else ShardReader()


def extents(record: VideoRecord, frames: Sequence[int], sounds: Sequence[tuple[int, int]]) -> list[Extent]:
    """What decoders will read for some frames (sorted, distinct) and some windows of sound (start, samples)."""
    found = []
    try:
        groups = list(reads(record, runs(record, frames), _WASTE)) if len(frames) else []
    except (DecodeError, IndexError):
        groups = []  # a damaged table: the decoder will say what is wrong with it
    for _, first, stop in groups:
        offset = record.packet_offset + int(record.packet_sizes[:first].sum(dtype=np.int64))
        found.append(Extent(offset, record.packet_sizes[first:stop], record.packet_crcs[first:stop]))
    for start, count in sounds:
        first, stop = sound_blocks(record, start, count)
        ends = np.minimum(np.arange(first, stop + 1) * AUDIO_BLOCK, record.num_samples)
        if first < stop <= len(record.audio_crcs):
            offset = record.audio_offset + 2 * first * AUDIO_BLOCK
            found.append(Extent(offset, 2 * np.diff(ends), record.audio_crcs[first:stop]))
    return found


@dataclass(slots=True, eq=False)
class _Landing:
    """The bytes of one clip: offset in the shard and bytes of each extent. in_file: they are in the thread's file."""

    shard: str
    parts: list[tuple[int, bytes]]
    in_file: bool = False


@final
class RemoteReader(Reader):
    """Byte ranges of remote shards; `ahead` fetches those of a clip before it is decoded.

    What is read without `ahead` is fetched at that moment. What is ahead is bounded by who calls: the loader calls it
    for the batches that it is making. cache_gb: see `ShardCache`; 0 = none.
    """

    waste = _WASTE

    def __init__(self, index: ShardIndex, cache_gb: float = 0.0) -> None:
        assert index.url
        self._storage = Storage(index.url)
        self._bytes = {f"{index.url}/{name}": size for name, size in shard_bytes(index.root).items()}
        self._cache = ShardCache(index.root / _CACHE_FOLDER, int(cache_gb * 2**30)) if cache_gb > 0 else None
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="clipmill-fetch")
        self._local = threading.local()
        self._files: list[int] = []
        self._lock = threading.Lock()

    def ahead(self, record: VideoRecord, wanted: Sequence[Extent]) -> AbstractContextManager[float]:
        """Begin to fetch what a clip needs, to be entered by the thread that decodes it.

        Entering waits for the clip and returns the seconds of that; in the block this thread reads from it. Raises
        what `read` raises.
        """
        coming = [(extent.offset, self._pool.submit(self._load, record, extent)) for extent in wanted]
        return self._landed(record.shard, coming)

    @contextmanager
    def _landed(self, shard: str, coming: list[tuple[int, Future[bytes]]]) -> Iterator[float]:
        start_s = time.perf_counter()
        landing = _Landing(shard, [(offset, future.result()) for offset, future in coming])
        self._local.landing = landing
        try:
            yield time.perf_counter() - start_s
        finally:
            self._local.landing = None
            if landing.in_file:
                os.ftruncate(self._local.file, 0)

    def take_traffic(self) -> tuple[int, int]:
        """(requests, bytes from the network) since the last call."""
        return self._storage.take_traffic()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """See `Reader.read`; raises StorageError where that cannot be found out."""
        landing: _Landing | None = getattr(self._local, "landing", None)
        if landing is not None and landing.shard == shard:
            for start, data in landing.parts:
                if start <= offset and offset + size <= start + len(data):
                    return data if size == len(data) else data[offset - start : offset - start + size]
        return self._fetch(shard, offset, size)

    def descriptor(self, shard: str) -> int:
        """See `Reader.descriptor`: a file in memory with the clip that `ahead` fetched."""
        file: int | None = getattr(self._local, "file", None)
        if file is None:
            file = self._local.file = _memory_file()
            with self._lock:
                self._files.append(file)
        landing: _Landing | None = getattr(self._local, "landing", None)
        if landing is not None and landing.shard == shard and not landing.in_file:
            landing.in_file = True
            for offset, data in landing.parts:
                os.pwrite(file, data, offset)
        return file

    def abandon(self) -> None:
        """Give up what is still on its way, so that nobody waits for it."""
        self._storage.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """See `Reader.close`."""
        self.abandon()
        self._pool.shutdown(wait=True)
        if self._cache is not None:
            self._cache.close()
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _load(self, record: VideoRecord, extent: Extent) -> bytes:
        """The bytes of an extent, as far as possible from the cache."""
        if self._cache is None:
            return self._fetch(record.shard, extent.offset, extent.size)
        self._check(record.shard, extent.offset + extent.size)
        data, missing = self._cache.get(record, extent)
        parts = []
        for start, stop in missing:
            data[start:stop] = part = self._fetch(record.shard, extent.offset + start, stop - start)
            parts.append((extent.offset + start, part))
        if parts:
            self._cache.put(record, parts)
        return bytes(data)

    def _fetch(self, shard: str, offset: int, size: int) -> bytes:
        self._check(shard, offset + size)
        return self._storage.read(shard.rpartition("/")[2], offset, offset + size) if size else b""

    def _check(self, shard: str, end: int) -> None:
        """Refuse what cannot be there before memory is taken and a request is made for it."""
        if end > self._bytes.get(shard, 0):
            raise ShardError(f"{shard}: ends before byte {end} that the index names; the index is damaged, pack again")


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("clipmill-clip")
    with tempfile.TemporaryFile() as file:  # macOS: a file without a name, mostly in memory too
        return os.dup(file.fileno())
