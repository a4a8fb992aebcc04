"""Rings of slots: the memory that batches are made in, by threads of this process or by decode processes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from clipmill.pipeline.cache import FrameCache
from clipmill.pipeline.fill import Engine, EngineOptions, Filled
from clipmill.pipeline.memory import SharedBuffer
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.slot import Job, Shape, Slot
from clipmill.pipeline.transfer import Transfer
from clipmill.pipeline.views import Planner
from clipmill.pipeline.workers import WorkerProcess

_THREADS_PER_PROCESS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes what is in them."""

    threads: int = 0
    """Decode threads per process; 0 = choose by the number of cores."""
    processes: int = -1
    """Decode processes; 0 = decode in this process, -1 = choose."""
    ahead: int = 2
    """Batches made in advance."""
    decoder: str = "auto"
    """Name of the decoder, see `clipmill doctor`; auto = the fastest for each record."""
    cache_gb: float = 0.0
    """GiB of memory for decoded frames, which later epochs copy instead of decoding."""
    shard_cache_gb: float = 0.0
    """GiB of local disk for what is read of shards on object storage."""
    max_damaged: float = 0.01
    """Share of the records that may turn out damaged before the run stops."""

    def allowed_damage(self, records: int) -> int:
        """How many of the records may turn out damaged."""
        return max(1, int(self.max_damaged * records))

    def resolved(self, cores: int) -> LoaderConfig:
        """The same with all automatic choices made for ``cores`` cores."""
        processes = self.processes
        if processes < 0:
            processes = 0 if cores <= _THREADS_PER_PROCESS else cores // _THREADS_PER_PROCESS
        threads = self.threads or max(1, min(cores, _THREADS_PER_PROCESS))
        return replace(self, threads=threads, processes=processes, ahead=max(self.ahead, processes))


def _engine_options(index: ShardIndex, config: LoaderConfig, cache: FrameCache | None) -> EngineOptions:
    return {
        "threads": config.threads,
        "decoder": config.decoder,
        "cache": cache,
        "shard_cache_gb": config.shard_cache_gb,
        "allowed_damage": config.allowed_damage(len(index)),
    }


class ThreadRing:
    """Decode threads in this process; slots are ordinary memory that grows when a batch needs more."""

    def __init__(
        self,
        index: ShardIndex,
        planner: Planner,
        order: Order,
        shape: Shape,
        config: LoaderConfig,
        transfer: Transfer,
        cache: FrameCache | None,
    ) -> None:
        self._transfer = transfer
        self._shape = shape
        self._engine = Engine(index, planner, order, shape, **_engine_options(index, config, cache))
        self._buffers: dict[int, np.ndarray] = {}

    def submit(self, job: Job, number: int) -> Future[tuple[Filled, Slot]]:
        """Start making a batch in slot ``number``; the future gives the outcome and the slot."""
        result: Future[tuple[Filled, Slot]] = Future()
        slots: list[Slot] = []

        def grow(size: int) -> Slot:
            buffer = self._buffers.get(number)
            if buffer is None or len(buffer) < size:
                buffer = self._buffers[number] = self._transfer.empty(size * 5 // 4)
            slots.append(Slot(buffer, self._shape))
            return slots[-1]

        def relay(done: Future[Filled]) -> None:
            error = done.exception()
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result((done.result(), slots[-1]))

        self._engine.submit(job, grow).add_done_callback(relay)
        return result

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on."""
        self._engine.set_order(order)

    def close(self) -> None:
        """Stop all work and free the memory."""
        self._engine.close()
        self._buffers.clear()


class ProcessRing:
    """Decode processes; slots are shared memory."""

    def __init__(
        self,
        index: ShardIndex,
        planner: Planner,
        order: Order,
        shape: Shape,
        config: LoaderConfig,
        transfer: Transfer,
        cache: FrameCache | None,
    ) -> None:
        self._transfer = transfer
        self._shape = shape
        options = _engine_options(index, config, cache)
        self._workers = [WorkerProcess(index, planner, order, shape, **options) for _ in range(config.processes)]
        self._buffers = [SharedBuffer() for _ in range(config.ahead + 1)]

    def submit(self, job: Job, number: int) -> Future[tuple[Filled, Slot]]:
        """Start making a batch in slot ``number``; the future gives the outcome and the slot."""
        result: Future[tuple[Filled, Slot]] = Future()
        buffer = self._buffers[number]

        def relay(done: Future[tuple[Filled, int]]) -> None:
            try:
                filled, size = done.result()
                if len(buffer.array) < size:
                    self._remap(buffer, size)
                result.set_result((filled, Slot(buffer.array, self._shape)))
            except BaseException as error:  # of mapping and pinning too: nobody else hears of errors here
                result.set_exception(error)

        self._workers[job.number % len(self._workers)].submit(job, buffer.path).add_done_callback(relay)
        return result

    def set_order(self, order: Order) -> None:
        """Use another order for jobs submitted from now on."""
        for worker in self._workers:
            worker.set_order(order)

    def _remap(self, buffer: SharedBuffer, size: int) -> None:
        if len(buffer.array):
            self._transfer.unpin(buffer.array)
        self._transfer.pin(buffer.fit(size))

    def close(self) -> None:
        """Stop all work and free the memory."""
        for worker in self._workers:
            worker.close()
        for buffer in self._buffers:
            if len(buffer.array):
                self._transfer.unpin(buffer.array)
            buffer.close()
