"""The few calls of the CUDA driver that decoding needs, without torch."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache


def number() -> int:
    """The GPU of this process: its place among the processes of this machine (LOCAL_RANK, as torchrun sets it)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """GPUs that the driver shows to this process; 0 without a driver."""
    driver, found = _driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(found)):
        return 0
    return found.value


def primary_context(device: int) -> int:
    """The handle of the context that torch and every library built on the CUDA runtime share on a GPU.

    It is retained for the life of the process: contexts of our own would cost hundreds of megabytes each.
    """
    driver = _driver()
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), device):
        raise RuntimeError(f"no GPU {device} for the CUDA driver (it shows {count()})")
    if code := driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):
        raise RuntimeError(f"GPU {device} cannot be used (CUDA error {code})")
    assert context.value is not None
    return context.value


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver
