"""From slot to device: pinned memory, a copy stream, and one batch of lookahead.

On a CPU all of this is nothing: the slot is read where it lies.

Order on a GPU. A slot is copied, and its batch computed, on a stream of its own. The slot may be written again when
the event that `upload` records after the copy has happened. The caller's stream waits for the event that follows the
batch's last kernel; from then on the batch's memory also belongs to the caller's stream (``record_stream``), so that
it is not given to a later batch before the caller's kernels are done with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.batch import ClipBatch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, whichever is current in this thread


class Upload:
    """Host memory and its copy on the device, which are the same on a CPU."""

    def __init__(self, host: np.ndarray, there: Tensor) -> None:
        self._host = host
        self._there = there

    def at(self, window: np.ndarray) -> Tensor:
        """The bytes of a contiguous window of the host memory, flat uint8 on the device."""
        start = window.ctypes.data - self._host.ctypes.data
        assert window.flags.c_contiguous
        assert window.nbytes == 0 or 0 <= start <= len(self._host) - window.nbytes
        return self._there[start : start + window.nbytes]


class Transfer:
    """Moves slots to one device."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:  # other threads may have another current device
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._left: torch.cuda.Event | None = None

    def empty(self, size: int) -> np.ndarray:
        """Host memory for a slot, page-locked where the device can copy from it by itself."""
        if self.stream is None:
            return np.empty(size, np.uint8)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    def pin(self, array: np.ndarray) -> None:
        """Page-lock memory that was mapped elsewhere (shared with decode processes)."""
        if self.stream is not None:
            with torch.cuda.device(self.device):
                code = _runtime().cudaHostRegister(array.ctypes.data, array.nbytes, _PORTABLE)
            if int(code) != 0:
                raise RuntimeError(
                    f"cannot page-lock {array.nbytes} bytes for the copy to {self.device} (CUDA error {int(code)}); "
                    "raise the locked-memory limit (ulimit -l) or lower the batch size"
                )

    def unpin(self, array: np.ndarray) -> None:
        """Undo `pin` before the mapping goes away; no copy from it may be under way."""
        if self.stream is not None:
            with torch.cuda.device(self.device):
                _runtime().cudaHostUnregister(array.ctypes.data)

    def upload(self, host: np.ndarray) -> Upload:
        """Start to copy flat bytes to the device, in one piece; they must not change until `mark`'s event."""
        if self.stream is None:
            return Upload(host, torch.from_numpy(host))
        with torch.cuda.stream(self.stream):
            there = torch.from_numpy(host).to(self.device, non_blocking=True)
            self._left = torch.cuda.Event()
            self._left.record(self.stream)
        return Upload(host, there)

    def mark(self) -> torch.cuda.Event | None:
        """An event that has happened when the last upload, and so every one before it, has left its memory."""
        return self._left

    def settle(self) -> None:
        """Wait until all uploads have left their memory."""
        if self._left is not None:
            self._left.synchronize()

    def ahead(
        self, batches: Generator[ClipBatch, None, None], ready: Callable[[], bool]
    ) -> Generator[ClipBatch, None, None]:
        """The same batches; on a GPU the next one is copied and computed while the caller works on this one.

        ready: whether the next batch can be had without waiting; if not, the one at hand is not held back for it.
        """
        if self.stream is None:
            yield from batches
            return
        made: deque[tuple[ClipBatch, torch.cuda.Event]] = deque()
        more = True
        try:
            while more or made:
                while more and (not made or (len(made) < 2 and ready())):
                    more = self._make(batches, made)
                if made:
                    yield self._hand_over(*made.popleft())
        finally:
            batches.close()

    def _make(self, batches: Iterator[ClipBatch], made: deque[tuple[ClipBatch, torch.cuda.Event]]) -> bool:
        """Launch one batch on the copy stream; False if there is none left."""
        with torch.cuda.stream(self.stream):
            batch = next(batches, None)
            if batch is not None:
                done = torch.cuda.Event()
                done.record(self.stream)
                made.append((batch, done))
        return batch is not None

    def _hand_over(self, batch: ClipBatch, done: torch.cuda.Event) -> ClipBatch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for tensor in (*batch.video.values(), *batch.audio.values(), *batch.aux.values(), batch.index, batch.uid):
            tensor.record_stream(current)
        batch.label.record_stream(current)
        return batch


def _runtime() -> Any:
    return torch.cuda.cudart()
