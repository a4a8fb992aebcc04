"""`compiled`: numba with this package's settings and a cache that survives, whoever owns the package's folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba

_SOURCES = ("simd.py", "kernels_*.py", "decode/libav_calls.py", "decode/targets.py")
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "arcp", "nsz"},
}


def inlined(function: Callable) -> Any:
    """A small function that is compiled into its callers."""
    return numba.njit(**_OPTIONS, forceinline=True)(function)


def compiled(function: Callable) -> Any:
    """Compile a function on its first call, without the GIL; the machine code is kept in `cache_folder`."""
    folder = cache_folder()
    if folder is None:
        return numba.njit(**_OPTIONS)(function)
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # numba looks at it now, and only for this function
    try:
        return numba.njit(**_OPTIONS, cache=True)(function)
    finally:
        config.CACHE_DIR = before


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The folder of the machine code of these very sources; None if none can be written (then nothing is kept).

    The first writable of: NUMBA_CACHE_DIR, the package's ``__pycache__``, the user's cache. numba knows that a cached
    function is outdated only if its own file changes, not if a function does that it calls: hence the digest.
    """
    here = Path(__file__).parent
    digest = blake2b(digest_size=8)
    for source in sorted(path for pattern in _SOURCES for path in here.glob(pattern)):
        digest.update(source.read_bytes())
    named = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clipmill"
    for base in (Path(named).absolute(),) if named else (here / "__pycache__", user):
        if not base.is_absolute():
            continue
        folder = base / f"kernels-{digest.hexdigest()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None
