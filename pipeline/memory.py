"""Memory that several processes of one machine map."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np


class SharedBuffer:
    """A file in memory that can grow. Other processes map it by its ``path``, as long as this object lives.

    On Linux the file has no name in any folder: nothing is left behind however the process ends, and the size of
    ``/dev/shm``, small in most containers, does not matter.
    """

    def __init__(self, path: str | None = None) -> None:
        self._named = False
        if path is None and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("clipmill")
            path = f"/proc/{os.getpid()}/fd/{self._file}"
        elif path is None:
            self._file, path = tempfile.mkstemp(prefix="clipmill-", suffix=".shared")
            self._named = True
        else:
            self._file = os.open(path, os.O_RDWR)
        self.path = path
        self.array = np.empty(0, np.uint8)

    def fit(self, size: int) -> np.ndarray:
        """Map at least ``size`` bytes, growing the file if it is smaller, and return the mapping."""
        if len(self.array) < size:
            if os.fstat(self._file).st_size < size:
                os.posix_fallocate(self._file, 0, size * 5 // 4)  # the next batch may need a little more
            self._map()
        return self.array

    def reserve(self, size: int) -> np.ndarray:
        """As `fit`, but memory is taken only by `claim`."""
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        self._map()
        return self.array

    def claim(self, offset: int, size: int) -> bool:
        """Make sure that a range of a reserved file has memory; False if there is none left."""
        try:
            os.posix_fallocate(self._file, offset, size)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the file up; mappings stay valid until the last array of them is gone."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._named:
            Path(self.path).unlink(missing_ok=True)

    def _map(self) -> None:
        self.array = np.frombuffer(mmap.mmap(self._file, os.fstat(self._file).st_size), np.uint8)
