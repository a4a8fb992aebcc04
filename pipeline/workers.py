"""Decode processes: the same engine as in `clipmill.pipeline.fill`, behind shared memory.

Python's own part of decoding is a ceiling for one process. Each worker process makes whole batches: it plans, decodes
with its own threads and writes straight into a ring slot that the parent maps too. Only small control messages cross
the pipe; pictures and tables never do.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import tempfile
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from clipmill.pipeline.fill import Engine, Filled
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.slot import Job, Shape, Slot
from clipmill.pipeline.views import Planner


class WorkerDiedError(RuntimeError):
    """A decode process ended without an answer."""


class SharedBuffer:
    """A file in memory (``/dev/shm`` where there is one) that several processes map and that can grow."""

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            handle, path = tempfile.mkstemp(prefix="clipmill-", suffix=".slot", dir=folder)
            os.close(handle)
        self.path = path
        self.array = np.empty(0, np.uint8)

    def fit(self, size: int) -> np.ndarray:
        """Map at least ``size`` bytes, growing the file if it is smaller, and return the mapping."""
        if len(self.array) < size:
            with open(self.path, "r+b") as file:
                if os.fstat(file.fileno()).st_size < size:
                    os.posix_fallocate(file.fileno(), 0, size)
                size = os.fstat(file.fileno()).st_size
                self.array = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
        return self.array

    def unlink(self) -> None:
        """Remove the name; existing mappings stay valid until dropped."""
        Path(self.path).unlink(missing_ok=True)


class WorkerProcess:
    """The parent's end of one decode process; `submit` mirrors `Engine.submit`."""

    def __init__(
        self, index: ShardIndex, planner: Planner, order: Order, shape: Shape, *, threads: int, decoder: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        arguments = (child, index, planner, order, shape, threads, decoder)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="clipmill-decode")
        self._process.start()
        child.close()
        self._waiting: dict[int, Future[tuple[Filled, int]]] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="clipmill-listen")
        self._listener.start()

    def submit(self, job: Job, path: str) -> Future[tuple[Filled, int]]:
        """Make batch ``job`` in the shared buffer at ``path``; resolves to the outcome and the buffer's size."""
        future: Future[tuple[Filled, int]] = Future()
        with self._lock:
            if not self._process.is_alive():
                raise WorkerDiedError(self._obituary())
            self._waiting[self._next] = future
            self._pipe.send((self._next, job, path))
            self._next += 1
        return future

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on."""
        self._pipe.send(order)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, BrokenPipeError):
            self._pipe.send(None)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._listener.join(timeout=5)
        self._pipe.close()

    def _listen(self) -> None:
        while True:
            try:
                number, filled, size, error = self._pipe.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._waiting.pop(number)
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result((filled, size))
        with self._lock:
            for future in self._waiting.values():
                future.set_exception(WorkerDiedError(self._obituary()))
            self._waiting.clear()

    def _obituary(self) -> str:
        self._process.join(timeout=1)
        return (
            f"decode process {self._process.pid} ended with code {self._process.exitcode}; "
            "a negative code is a signal (-9: out of memory). Try fewer processes or `clipmill verify`"
        )


def _serve(
    pipe: Connection, index: ShardIndex, planner: Planner, order: Order, shape: Shape, threads: int, decoder: str
) -> None:
    """The loop of a decode process."""
    engine = Engine(index, planner, order, shape, threads=threads, decoder=decoder)
    buffers: dict[str, SharedBuffer] = {}
    lock = threading.Lock()

    def answer(number: int, buffer: SharedBuffer, future: Future[Filled]) -> None:
        error = future.exception()
        if isinstance(error, Exception):
            try:
                message = (number, None, 0, error)
                with lock:
                    pipe.send(message)
                return
            except Exception as cause:  # an exception that cannot be pickled still has to arrive
                error = RuntimeError(f"{type(error).__name__}: {error} (not picklable: {cause})")
        with lock, contextlib.suppress(OSError):
            pipe.send((number, None if error else future.result(), len(buffer.array), error))

    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            break
        if message is None:
            break
        if isinstance(message, Order):
            engine.set_order(message)
            continue
        number, job, path = message
        buffer = buffers.setdefault(path, SharedBuffer(path))
        future = engine.submit(job, lambda size, buffer=buffer: Slot(buffer.fit(size), shape))
        future.add_done_callback(lambda done, number=number, buffer=buffer: answer(number, buffer, done))
    engine.close()
