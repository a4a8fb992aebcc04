"""Objects below a URL, read by byte range: object storage and web servers through fsspec.

All of fsspec's file systems work; those that are asynchronous inside (http, s3, gs, az) are read by many threads at
once over shared connections. Nothing here may be used on both sides of a fork: open a `Storage` where it is used.
"""

from __future__ import annotations

import errno
import threading
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from clipmill.pipeline.shard import ShardError

CONNECTIONS = 32  # requests in flight
_ATTEMPTS = 5
_TIMEOUT_S = 30.0  # of one attempt
_FIRST_PAUSE_S = 0.2  # doubles after every attempt
_CHUNK_BYTES = 8 << 20
_THREAD_SAFE = ("file", "local", "memory")  # of the file systems that are not asynchronous inside
_EXTRAS = {"http": "remote", "https": "remote", "s3": "s3", "s3a": "s3"}
_S3 = {
    # botocore would open only 10 connections, and its own attempts would multiply with ours
    "config_kwargs": {"max_pool_connections": CONNECTIONS, "connect_timeout": 10, "retries": {"max_attempts": 1}}
}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}


class StorageError(OSError):
    """Object storage that cannot be reached, refuses, or fails again and again. Not the fault of any record."""


class Storage:
    """The objects below ``url``, for all threads of this process.

    Passing faults (no connection, time-outs, 5xx) are tried `_ATTEMPTS` times, with pauses that double. After the first
    StorageError all threads get the same one, at once. Credentials and other settings are taken from where fsspec and
    the provider's library look for them: environment and files.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = self.url.partition("://")[0]
        if "?" in self.url:
            raise StorageError(f"{self.url}: give the URL of the data set's folder, without a query")
        try:
            options = _OPTIONS.get(protocol, {})
            self._fs, self._root = import_module("fsspec.core").url_to_fs(self.url, skip_instance_cache=True, **options)
        except ImportError as error:
            remedy = f"pip install 'clipmill[{_EXTRAS.get(protocol, 'remote')}]'"
            raise StorageError(f"{self.url}: a package is missing ({error}); {remedy}") from error
        except ValueError as error:  # of a protocol nobody knows
            raise StorageError(f"{self.url}: {error}; give a folder, or a URL that fsspec opens") from error
        self._turn = nullcontext() if self._fs.async_impl or protocol in _THREAD_SAFE else threading.Lock()
        self._over = threading.Event()
        self._reason = f"{self.url}: was closed"
        self._lock = threading.Lock()
        self._traffic = (0, 0)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Exactly bytes [start, stop) of an object.

        Raises ShardError if it is missing or ends before ``stop``, StorageError if that cannot be found out.
        """
        data = self._attempts(name, start, stop)
        if len(data) > stop - start:
            raise self._failure(
                f"{name}: the server sent {len(data)} bytes for a range of {stop - start}; it must support byte ranges "
                "(HTTP 206)"
            )
        if len(data) < stop - start:
            raise ShardError(
                f"{self.url}/{name}: ends before the bytes that the index promises; upload the data set again"
            )
        return data

    def read_all(self, name: str) -> bytes:
        """A small object; errors as of `read`."""
        return self._attempts(name)

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a file, piece by piece; errors as of `read`."""
        with path.open("wb") as file:
            data = b" "
            while data:
                start = file.tell()
                data = self._attempts(name, start, start + _CHUNK_BYTES)
                file.write(data)

    def take_traffic(self) -> tuple[int, int]:
        """(requests, bytes received) since the last call."""
        with self._lock:
            traffic, self._traffic = self._traffic, (0, 0)
        return traffic

    def close(self) -> None:
        """Close the connections; a thread that waits for another attempt gives up."""
        self._over.set()
        self._fs = None  # the last reference: its finalizer closes the session

    def _get(self, path: str, start: int | None, stop: int | None) -> bytes:
        fs = self._fs
        if fs is None:
            raise StorageError(self._reason)
        if fs.async_impl:
            sync = import_module("fsspec.asyn").sync
            data = sync(fs.loop, fs._cat_file, path, start=start, end=stop, timeout=_TIMEOUT_S)
        else:
            with self._turn:
                data = fs.cat_file(path, start=start, end=stop)
        with self._lock:
            self._traffic = (self._traffic[0] + 1, self._traffic[1] + len(data))
        return data

    def _attempts(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """An object or what there is of a range of it; passing faults are tried again."""
        failed: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if self._over.wait(_FIRST_PAUSE_S * 2 ** (attempt - 1) if attempt else 0):
                raise StorageError(self._reason)
            try:
                return self._get(f"{self._root}/{name}", start, stop)
            except StorageError:
                raise
            except FileNotFoundError as error:
                raise ShardError(
                    f"{self.url}/{name}: is not there; check the URL, or upload the whole data set"
                ) from error
            except Exception as error:  # libraries raise what they like
                status = getattr(error, "status", None)
                if start is not None and (status == 416 or getattr(error, "errno", None) == errno.EINVAL):
                    return b""  # the object ends before
                refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
                if refused or isinstance(error, PermissionError):
                    raise self._failure(
                        f"{name}: access refused ({_text(error)}); check URL and credentials"
                    ) from error
                failed = error
        assert failed is not None
        raise self._failure(
            f"{name}: failed {_ATTEMPTS} times, the last: {_text(failed)}; check network, URL and credentials"
        ) from failed

    def _failure(self, what: str) -> StorageError:
        """The error that ends the use of this storage."""
        self._reason = f"{self.url}/{what}"
        self._over.set()
        return StorageError(self._reason)


def _text(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
