"""Decode processes: the same engine as in `clipmill.pipeline.fill`, behind shared memory.

Python's own part of decoding is a ceiling for one process, and media that crash a decoder must not end a training. Each
worker process makes whole batches: it plans, decodes with its own threads and writes straight into a ring slot that the
parent maps too. Only small control messages cross the pipe; pictures and tables never do.

When a process dies, a new one makes its unfinished batches again, one at a time and row by row. If it dies again, the
row it was at (`Slot.flight`) names the record to blame, which is replaced like any damaged one. So a process killed
from outside changes nothing, and a record that crashes the decoder is left out in the same way every time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Unpack

from clipmill.pipeline.fill import Engine, EngineOptions, Filled
from clipmill.pipeline.memory import SharedBuffer
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.slot import Job, Shape, Slot
from clipmill.pipeline.views import Planner

_MAX_DEATHS = 3  # in a row that tell nothing new
_MAX_BLAMED = 20  # records of one batch


class WorkerDiedError(RuntimeError):
    """A decode process ended again and again without an answer."""


@dataclass(slots=True, eq=False)
class _Request:
    """One batch that was asked for."""

    number: int
    job: Job
    path: str
    order: Order
    future: Future[tuple[Filled, int]]
    skips: dict[int, int] = field(default_factory=dict)
    blamed: dict[int, str] = field(default_factory=dict)
    alone: bool = False


class WorkerProcess:
    """The parent's end of one decode process; `submit` mirrors `Engine.submit`.

    Attribute ``deaths``: how often the process had to be replaced.
    """

    def __init__(
        self,
        index: ShardIndex,
        planner: Planner,
        order: Order,
        shape: Shape,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.deaths = 0
        self._unexplained = 0  # deaths in a row without an answer or a record to blame
        self._shape = shape
        self._order = order
        self._arguments = (index, planner, shape, options)
        self._waiting: deque[_Request] = deque()  # in the order they were asked for
        self._sent = 0  # of them
        self._next = 0
        self._over = False
        self._lock = threading.Lock()
        self._start()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="clipmill-listen")
        self._listener.start()

    def submit(self, job: Job, path: str) -> Future[tuple[Filled, int]]:
        """Make batch ``job`` in the shared buffer at ``path``; resolves to the outcome and the buffer's size."""
        with self._lock:
            if self._over:
                raise WorkerDiedError(self._obituary())
            request = _Request(self._next, job, path, self._order, Future())
            self._next += 1
            self._waiting.append(request)
            self._send()
        return request.future

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on."""
        with self._lock:
            self._order = order

    @property
    def pid(self) -> int:
        """Number of the process that is at work now."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._over = True
            with contextlib.suppress(OSError):
                self._pipe.send(None)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._listener.join(timeout=5)
        self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._at_order = self._order
        arguments = (child, self._order, *self._arguments)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="clipmill-decode")
        self._process.start()
        child.close()

    def _send(self) -> None:
        """Pass on what may be passed on; after a death, batches from before it go one at a time."""
        with contextlib.suppress(OSError):  # it has just died: the listener will know
            while self._sent < len(self._waiting):
                request = self._waiting[self._sent]
                if self._sent and (request.alone or self._waiting[0].alone):
                    break
                if request.order is not self._at_order:
                    self._pipe.send(request.order)
                    self._at_order = request.order
                self._pipe.send((request.number, request.job, request.path, request.skips, request.alone))
                self._sent += 1

    def _listen(self) -> None:
        while True:
            try:
                number, filled, size, error = self._pipe.recv()
            except (EOFError, OSError):
                if self._revive():
                    continue
                break
            with self._lock:
                self._unexplained = 0
                request = next(one for one in self._waiting if one.number == number)
                self._waiting.remove(request)
                self._sent -= 1
                self._send()
            if error is not None:
                request.future.set_exception(error)
            else:
                filled.damaged.update(request.blamed)
                request.future.set_result((filled, size))
        with self._lock:
            self._over = True
            left = list(self._waiting)
            self._waiting.clear()
        for request in left:
            request.future.set_exception(WorkerDiedError(self._obituary()))

    def _revive(self) -> bool:
        """Put a new process in the place of a dead one; False if there is no use in it."""
        with self._lock:
            if self._over:
                return False
            self._process.join(timeout=5)
            self.deaths += 1
            unfinished = [self._waiting[i] for i in range(self._sent)]
            blamed = [self._blame(request) for request in unfinished]
            self._unexplained = 0 if any(blamed) else self._unexplained + 1
            if self._unexplained > _MAX_DEATHS or any(len(one.blamed) > _MAX_BLAMED for one in unfinished):
                return False
            for request in unfinished:
                request.alone = True
            self._sent = 0
            self._pipe.close()
            self._start()
            self._send()
        return True

    def _blame(self, request: _Request) -> bool:
        """If a batch was being made alone, book the record that was in work as damaged."""
        buffer = SharedBuffer(request.path)
        slot = Slot(buffer.fit(Slot.header_bytes(self._shape)), self._shape)
        rows = (slot.flight == 1).nonzero()[0].tolist()
        found = request.alone and len(rows) == 1
        if found:
            request.skips[rows[0]] = request.skips.get(rows[0], 0) + 1
            reason = f"decoding it ends the process ({_ending(self._process.exitcode)})"
            request.blamed[int(slot.samples["index"][rows[0]])] = reason
        slot.flight[:] = 0
        buffer.close()
        return found

    def _obituary(self) -> str:
        return (
            f"decode process {self._process.pid} ended with {_ending(self._process.exitcode)}, {self.deaths} times in "
            "all; signal 9 is most often a lack of memory. Try fewer processes or `clipmill verify`"
        )


def _ending(code: int | None) -> str:
    """An exit code in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    known = {item.value: item.name for item in signal.Signals}
    return f"signal {-code}, {known.get(-code, 'unknown')}"


def _serve(
    pipe: Connection,
    order: Order,
    index: ShardIndex,
    planner: Planner,
    shape: Shape,
    options: EngineOptions,
) -> None:
    """The loop of a decode process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    engine = Engine(index, planner, order, shape, **options)
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
        number, job, path, skips, alone = message
        if path not in buffers:
            buffers[path] = SharedBuffer(path)
        buffer = buffers[path]
        future = engine.submit(job, lambda size, buffer=buffer: Slot(buffer.fit(size), shape), skips, alone)
        future.add_done_callback(lambda done, number=number, buffer=buffer: answer(number, buffer, done))
    engine.close()
