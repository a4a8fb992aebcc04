"""Filling slots: threads that plan a batch, read its bytes, decode, and copy what is needed into the slot.

`Engine` works in this process. `clipmill.pipeline.workers` runs the same engine in other processes over shared
memory. Neither imports torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Required, TypedDict

import numpy as np

from clipmill.pipeline.cache import FrameCache
from clipmill.pipeline.decode.decoder import DecodeError, Decoder, new_decoder
from clipmill.pipeline.decode.targets import fill
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import RemoteReader, extents, open_reader
from clipmill.pipeline.shard import Reader, ShardError
from clipmill.pipeline.slot import BatchPlan, BatchPlanner, Job, Shape, Slot
from clipmill.pipeline.views import Planner

_CHUNKS = 4  # per thread and batch
_CLOSED = "the loader was closed before this batch was made"
_Arrival = AbstractContextManager[float]  # of a clip's bytes: see `RemoteReader.ahead`
_LOCAL = nullcontext(0.0)


@dataclass(slots=True)
class Stages:
    """Seconds of thread time per stage, and what was moved. Sums over threads, so they can exceed wall time.

    clips_cached: clips that were copied from the cache of decoded frames. requests, network_bytes: answers of object
    storage, and bytes in them.
    """

    plan_s: float = 0.0
    read_s: float = 0.0
    decode_s: float = 0.0
    copy_s: float = 0.0
    frames_decoded: int = 0
    frames_used: int = 0
    payload_bytes: int = 0
    clips: int = 0
    clips_cached: int = 0
    requests: int = 0
    network_bytes: int = 0

    def add(self, other: Stages) -> None:
        """Add another set of counters to this one."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(slots=True)
class Filled:
    """The outcome of one job: counters, and the records found damaged with the reason."""

    stages: Stages = field(default_factory=Stages)
    damaged: dict[int, str] = field(default_factory=dict)


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of `Engine`, for those who pass them on."""

    threads: Required[int]
    decoder: str
    cache: FrameCache | None
    shard_cache_gb: float
    allowed_damage: int


class Engine:
    """A pool of decode threads. `submit` returns at once; the future resolves when the slot is complete.

    One more thread plans: the next batch is ready when the threads have finished this one. Clips of remote shards are
    fetched from then on. shard_cache_gb: see `open_reader`. allowed_damage: a batch with more damaged records is not
    made again without them, but given back as it is.
    """

    def __init__(
        self,
        index: ShardIndex,
        planner: Planner,
        order: Order,
        shape: Shape,
        *,
        threads: int,
        decoder: str = "auto",
        cache: FrameCache | None = None,
        shard_cache_gb: float = 0.0,
        allowed_damage: int = 1 << 62,
    ) -> None:
        self._planner = BatchPlanner(index, planner)
        self._order = order
        self._shape = shape
        self._views = planner.views
        self._threads = threads
        self._decoder_name = decoder
        self._cache = cache
        self._allowed_damage = allowed_damage
        self._reader = open_reader(index, shard_cache_gb)
        self._remote = self._reader if isinstance(self._reader, RemoteReader) else None
        self._local = threading.local()
        self._tasks: set[_Task] = set()  # not done yet
        self._closed = False
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="clipmill-decode-plan")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clipmill-decode")

    def submit(
        self,
        job: Job,
        grow: Callable[[int], Slot],
        skips: Mapping[int, int] | None = None,
        alone: bool = False,
    ) -> Future[Filled]:
        """Make batch ``job`` in the slot that ``grow(bytes needed)`` returns.

        skips: see `BatchPlanner.plan`. alone: one row after the other in one thread.
        """
        if self._closed:
            raise RuntimeError(_CLOSED)
        task = _Task(job, self._order, grow, dict(skips or {}), alone)
        self._tasks.add(task)
        task.future.add_done_callback(lambda _: self._tasks.discard(task))
        self._planning.submit(self._start, task)
        return task.future

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on; call it between epochs."""
        self._order = order

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped, and whoever waits for it gets a RuntimeError."""
        self._closed = True
        self._planning.shutdown(wait=True, cancel_futures=True)
        if self._remote is not None:
            self._remote.abandon()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for task in list(self._tasks):
            task.fail(RuntimeError(_CLOSED))
        self._reader.close()

    def _start(self, task: _Task) -> None:
        try:
            start_s = time.perf_counter()
            plan = self._planner.plan(task.job, task.order, task.skips)
            slot = task.grow(Slot.header_bytes(self._shape) + plan.payload_bytes)
            self._write_tables(plan, slot)
            task.filled.stages.plan_s += time.perf_counter() - start_s
            task.filled.stages.payload_bytes = plan.payload_bytes
            arrivals = self._ahead(plan)
            count = task.job.count
            chunk = count if task.alone else max(1, -(-count // (_CHUNKS * self._threads)))
            bounds = [(low, min(low + chunk, count)) for low in range(0, count, chunk)]
            task.left = len(bounds)
            for low, high in bounds:
                self._pool.submit(self._rows, task, plan, slot, arrivals, low, high)
        except BaseException as error:
            task.fail(error)

    def _ahead(self, plan: BatchPlan) -> Sequence[_Arrival]:
        """Begin to fetch the clips of a batch, where shards are not files."""
        if self._remote is None:
            return [_LOCAL] * len(plan.records)
        arrivals = []
        for record, drawn, targets in zip(plan.records, plan.drawn, plan.targets, strict=True):
            frames = np.unique(targets[:, 0])
            if self._cache is not None:
                frames = self._cache.unread(record, frames)
            spans = [drawn.spans[place] for place, view in enumerate(self._views) if view.modality == "audio"]
            sounds = [(span.start_sample, span.num_samples) for span in spans]
            arrivals.append(self._remote.ahead(record, extents(record, frames.tolist(), sounds)))
        return arrivals

    def _rows(
        self, task: _Task, plan: BatchPlan, slot: Slot, arrivals: Sequence[_Arrival], low: int, high: int
    ) -> None:
        stages, damaged = Stages(), {}
        try:
            worker = self._worker()
            begin_s, (read_s, decoded) = time.perf_counter(), worker.counters()
            for row in range(low, high):
                slot.flight[row] = 1
                try:
                    with arrivals[row] as wait_s:
                        stages.read_s += wait_s
                        worker.fill(plan, slot, row, stages)
                except (DecodeError, ShardError) as error:
                    damaged[row] = (plan.records[row].index, str(error))
                slot.flight[row] = 2
            read_until_s, decoded_until = worker.counters()
        except BaseException as error:
            task.fail(error)
            return
        stages.frames_decoded = decoded_until - decoded
        stages.read_s += read_until_s - read_s
        stages.decode_s = time.perf_counter() - begin_s - stages.read_s - stages.copy_s
        if self._remote is not None:
            stages.requests, stages.network_bytes = self._remote.take_traffic()
        if task.done(stages, damaged):
            again = task.retry and len(task.filled.damaged) <= self._allowed_damage
            if again:  # some records failed: take their successors and make the batch again
                task.retry = False
                self._start(task)
            else:
                task.future.set_result(task.filled)

    def _write_tables(self, plan: BatchPlan, slot: Slot) -> None:
        count = len(plan.records)
        slot.flight[:] = 0
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
            decoder = new_decoder(self._decoder_name, self._reader)
            worker = _Worker(decoder, self._reader, self._views, self._cache)
            self._local.worker = worker
        return worker


class _Task:
    """One batch in the making."""

    def __init__(self, job: Job, order: Order, grow: Callable[[int], Slot], skips: dict[int, int], alone: bool) -> None:
        self.job = job
        self.order = order
        self.grow = grow
        self.skips = skips
        self.alone = alone
        self.future: Future[Filled] = Future()
        self.filled = Filled()
        self.left = 0
        self.retry = False
        self._lock = threading.Lock()

    def done(self, stages: Stages, damaged: dict[int, tuple[int, str]]) -> bool:
        """Book one finished chunk; True for the last."""
        with self._lock:
            self.filled.stages.add(stages)
            for row, (record, reason) in damaged.items():
                self.filled.damaged[record] = reason
                self.skips[row] = self.skips.get(row, 0) + 1
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

    def __init__(self, decoder: Decoder, reader: Reader, views: tuple, cache: FrameCache | None) -> None:
        self._decoder = decoder
        self._reader = reader
        self._cache = cache
        self._sound = [(place, view.name) for place, view in enumerate(views) if view.modality == "audio"]

    def counters(self) -> tuple[float, int]:
        """Seconds that the decoder has spent reading, and the frames it has decoded."""
        return self._decoder.read_s, self._decoder.decoded

    def fill(self, plan: BatchPlan, slot: Slot, row: int, stages: Stages) -> None:
        """Read, decode and copy everything that one sample needs; books what `counters` do not tell."""
        record = plan.records[row]
        if self._sound:
            begin_s = time.perf_counter()
            for place, name in self._sound:
                span = plan.drawn[row].spans[place]
                slot.sound[name][row] = self._reader.samples(record, span.start_sample, span.num_samples)
            stages.read_s += time.perf_counter() - begin_s
        stages.clips += 1
        if plan.used[row] == 0:
            return
        targets = plan.targets[row]
        if self._cache is None:
            stages.copy_s += fill(self._decoder, record, targets, slot.payload)
        else:
            decoded = self._decoder.decoded
            stages.copy_s += self._cache.fill(self._decoder, record, targets, slot.payload)
            stages.clips_cached += self._decoder.decoded == decoded
        stages.frames_used += plan.used[row]
