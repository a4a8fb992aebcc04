"""Filling slots: threads that plan a batch, read its bytes, decode, and copy what is needed into the slot.

`Engine` works in this process. `clipmill.pipeline.workers` runs the same engine in other processes over shared
memory. Neither imports torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np

from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Planes, new_decoder
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.shard import ShardError, ShardReader
from clipmill.pipeline.slot import BatchPlan, BatchPlanner, Job, Shape, Slot
from clipmill.pipeline.views import Planner


@dataclass(slots=True)
class Stages:
    """Seconds of thread time per stage, and what was moved. Sums over threads, so they can exceed wall time."""

    plan_s: float = 0.0
    read_s: float = 0.0
    decode_s: float = 0.0
    copy_s: float = 0.0
    frames_decoded: int = 0
    frames_used: int = 0
    payload_bytes: int = 0
    clips: int = 0

    def add(self, other: Stages) -> None:
        """Add another set of counters to this one."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(slots=True)
class Filled:
    """The outcome of one job: counters, and the records found damaged with the reason."""

    stages: Stages = field(default_factory=Stages)
    damaged: dict[int, str] = field(default_factory=dict)


class Engine:
    """A pool of decode threads. `submit` returns at once; the future resolves when the slot is complete.

    grow: called with a byte count when a batch needs a larger slot; must return the enlarged one.
    """

    def __init__(
        self, index: ShardIndex, planner: Planner, order: Order, shape: Shape, *, threads: int, decoder: str = "pyav"
    ) -> None:
        self._planner = BatchPlanner(index, planner, order)
        self._shape = shape
        self._views = planner.views
        self._threads = threads
        self._decoder_name = decoder
        self._reader = ShardReader()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clipmill-decode")

    def submit(self, job: Job, grow: Callable[[int], Slot]) -> Future[Filled]:
        """Make batch ``job`` in the slot that ``grow(bytes needed)`` returns."""
        future: Future[Filled] = Future()
        self._pool.submit(self._start, _Task(job, grow, future))
        return future

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on; call it between epochs."""
        self._planner.order = order

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _start(self, task: _Task) -> None:
        try:
            start_s = time.perf_counter()
            plan = self._planner.plan(task.job)
            slot = task.grow(Slot.header_bytes(self._shape) + plan.payload_bytes)
            self._write_tables(plan, slot)
            task.filled.stages.plan_s += time.perf_counter() - start_s
            task.filled.stages.payload_bytes = plan.payload_bytes
            chunk = max(1, -(-task.job.count // (4 * self._threads)))
            bounds = [(low, min(low + chunk, task.job.count)) for low in range(0, task.job.count, chunk)]
            task.left = len(bounds)
            for low, high in bounds:
                self._pool.submit(self._rows, task, plan, slot, low, high)
        except BaseException as error:
            task.fail(error)

    def _rows(self, task: _Task, plan: BatchPlan, slot: Slot, low: int, high: int) -> None:
        stages, damaged = Stages(), {}
        try:
            worker = self._worker()
            for row in range(low, high):
                record = plan.records[row]
                try:
                    worker.fill(plan, slot, row, record, stages)
                except (DecodeError, ShardError) as error:
                    damaged[record.index] = str(error)
        except BaseException as error:
            task.fail(error)
            return
        if task.done(stages, damaged):
            if task.retry:  # some records failed: choose their successors and make the batch again
                self._planner.damaged.update(task.filled.damaged)
                task.retry = False
                self._start(task)
            else:
                task.future.set_result(task.filled)

    def _write_tables(self, plan: BatchPlan, slot: Slot) -> None:
        count = len(plan.records)
        samples = slot.samples[:count]
        for name in ("index", "uid", "label"):
            samples[name] = [getattr(record, name) for record in plan.records]
        samples["draw"] = plan.draws
        for name, table in plan.items.items():
            slot.items[name][:count] = table
        for place, view in enumerate(self._views):
            slot.start_s[view.name][:count] = [one.spans[place].start_s for one in plan.drawn]
        for name in self._shape.aux:
            slot.aux[name][:count] = [one.aux[name] for one in plan.drawn]

    def _worker(self) -> _Worker:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = _Worker(new_decoder(self._decoder_name, self._reader), self._reader, self._views)
            self._local.worker = worker
        return worker


class _Task:
    """One batch in the making."""

    def __init__(self, job: Job, grow: Callable[[int], Slot], future: Future[Filled]) -> None:
        self.job = job
        self.grow = grow
        self.future = future
        self.filled = Filled()
        self.left = 0
        self.retry = False
        self._lock = threading.Lock()

    def done(self, stages: Stages, damaged: dict[int, str]) -> bool:
        """Book one finished chunk; True for the last."""
        with self._lock:
            self.filled.stages.add(stages)
            self.filled.damaged.update(damaged)
            self.retry |= bool(damaged)
            self.left -= 1
            return self.left == 0

    def fail(self, error: BaseException) -> None:
        """Pass an unexpected error to whoever waits for the batch."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


class _Worker:
    """What one decode thread owns."""

    def __init__(self, decoder: Decoder, reader: ShardReader, views: tuple) -> None:
        self._decoder = decoder
        self._reader = reader
        self._sound = [(place, view.name) for place, view in enumerate(views) if view.modality == "audio"]

    def fill(self, plan: BatchPlan, slot: Slot, row: int, record: VideoRecord, stages: Stages) -> None:
        """Read, decode and copy everything that one sample needs."""
        begin_s = time.perf_counter()
        for place, name in self._sound:
            span = plan.drawn[row].spans[place]
            slot.sound[name][row] = self._reader.samples(record, span.start_sample, span.num_samples)
        sound_s = time.perf_counter() - begin_s
        stages.read_s += sound_s
        stages.clips += 1
        if not plan.items:
            return
        sink = _Sink(slot.payload, [table[row] for table in plan.items.values()])
        decoder = self._decoder
        read_s, decoded = decoder.read_s, decoder.decoded
        decoder.decode(record, sorted(sink.targets), sink.put)
        read_s = decoder.read_s - read_s
        stages.read_s += read_s
        stages.copy_s += sink.copy_s
        stages.decode_s += time.perf_counter() - begin_s - sound_s - read_s - sink.copy_s
        stages.frames_decoded += decoder.decoded - decoded
        stages.frames_used += len(sink.targets)


class _Sink:
    """Copies regions of decoded frames to their places in the payload."""

    __slots__ = ("copy_s", "targets")

    def __init__(self, payload: np.ndarray, rows: list[np.ndarray]) -> None:
        self.copy_s = 0.0
        self.targets: dict[int, list[tuple]] = {}
        for row in rows:
            for frame, x, y, w, h, offset in zip(
                *(row[name].tolist() for name in ("frame", "x", "y", "w", "h", "offset")), strict=True
            ):
                luma = payload[offset : offset + w * h].reshape(h, w)
                chroma = payload[offset + w * h : offset + w * h * 3 // 2].reshape(2, h // 2, w // 2)
                window = (slice(y, y + h), slice(x, x + w))
                half = (slice(y // 2, (y + h) // 2), slice(x // 2, (x + w) // 2))
                self.targets.setdefault(frame, []).append((luma, chroma[0], chroma[1], window, half))

    def put(self, frame: int, planes: Planes) -> None:
        start_s = time.perf_counter()
        y, u, v = planes
        for luma, blue, red, window, half in self.targets[frame]:
            luma[...] = y[window]
            blue[...] = u[half]
            red[...] = v[half]
        self.copy_s += time.perf_counter() - start_s
