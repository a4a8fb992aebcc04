"""From slot to device: pinned memory, a copy stream, and one batch of lookahead.

On a CPU all of this is nothing: the slot is read where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.batch import ClipBatch


class Transfer:
    """Moves slots to one device. `busy` slots must not be written until `wait` returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, size: int) -> np.ndarray:
        """Host memory for a slot, page-locked where the device can copy from it by itself."""
        if self.stream is None:
            return np.empty(size, np.uint8)
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    def pin(self, array: np.ndarray) -> None:
        """Page-lock memory that was mapped elsewhere (shared with decode processes)."""
        if self.stream is not None:
            runtime: Any = torch.cuda.cudart()
            code = runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0)
            if int(code) != 0:
                raise RuntimeError(
                    f"cannot page-lock {array.nbytes} bytes for the copy to {self.device} (CUDA error {int(code)}); "
                    "raise the locked-memory limit (ulimit -l) or lower the batch size"
                )

    def unpin(self, array: np.ndarray) -> None:
        """Undo `pin` before the mapping goes away."""
        if self.stream is not None:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(array.ctypes.data)

    def upload(self, array: np.ndarray) -> Tensor:
        """The array on the device; without blocking if it is page-locked."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def ahead(self, batches: Iterator[ClipBatch]) -> Iterator[ClipBatch]:
        """The same batches; on a GPU the next one is copied and augmented while the caller works on this one."""
        if self.stream is None:
            yield from batches
            return
        held: tuple[ClipBatch, torch.cuda.Event | None] | None = None
        while True:
            with torch.cuda.stream(self.stream):
                batch = next(batches, None)
                done = self.mark()
            if held is not None:
                yield self._hand_over(*held)
            if batch is None:
                return
            held = (batch, done)

    def mark(self) -> torch.cuda.Event | None:
        """An event that has happened when everything uploaded so far has left its slot."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def _hand_over(self, batch: ClipBatch, done: torch.cuda.Event | None) -> ClipBatch:
        current = torch.cuda.current_stream(self.device)
        if done is not None:
            current.wait_event(done)
        for group in (batch.video, batch.audio, batch.aux):
            for tensor in group.values():
                tensor.record_stream(current)
        for tensor in (batch.index, batch.uid, batch.label):
            tensor.record_stream(current)
        return batch
