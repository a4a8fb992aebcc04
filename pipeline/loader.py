"""The loader: a ring of slots that decode threads or processes fill in order, and the step from slot to device.

cursor -> order -> plan -> [slot: read + decode + copy] -> one copy to the device -> augment -> ClipBatch
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.audio import waveform_to_view
from clipmill.pipeline.augment import augment, op_params
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.fill import Engine, Filled, Stages
from clipmill.pipeline.order import Cursor, Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.slot import BatchPlanner, Job, Shape, Slot
from clipmill.pipeline.spec import AudioSpec, VideoSpec
from clipmill.pipeline.views import Planner
from clipmill.pipeline.workers import SharedBuffer, WorkerProcess

_THREADS_PER_PROCESS = 4


class DamageBudgetError(RuntimeError):
    """More records are damaged than the run allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes what is in them.

    threads: decode threads per process, 0 = choose by the number of cores. processes: decode processes, 0 = decode in
    this process, -1 = choose. ahead: batches made in advance. decoder: backend name. max_damaged: share of the
    records that may turn out damaged before the run stops.
    """

    threads: int = 0
    processes: int = -1
    ahead: int = 2
    decoder: str = "pyav"
    max_damaged: float = 0.01

    def resolved(self, cores: int) -> LoaderConfig:
        """The same with all automatic choices made for ``cores`` cores."""
        processes = self.processes
        if processes < 0:
            processes = 0 if cores <= _THREADS_PER_PROCESS else cores // _THREADS_PER_PROCESS
        threads = self.threads or max(1, min(cores, _THREADS_PER_PROCESS))
        return replace(self, threads=threads, processes=processes, ahead=max(self.ahead, processes))


class Loader:
    """Streams `ClipBatch` es of a planner's views over an index.

    batch_size: samples per process. rank, world: this process's share: of every global batch of batch_size * world
    positions it takes its own block, so the samples of a global batch do not depend on ``world``. drop_last: leave
    out an incomplete last batch; otherwise the last batch is smaller and no sample is repeated.

    Attributes: ``stages`` (`Stages`, sums since construction), ``wait_s`` (time the caller was blocked),
    ``augment_s``, ``damaged`` ({record number: reason}).
    """

    def __init__(
        self,
        index: ShardIndex,
        planner: Planner,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        repeat: int = 1,
        picks: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        device: torch.device | str = "cpu",
        config: LoaderConfig | None = None,
    ) -> None:
        names = [view.name for view in planner.views]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"a planner needs views with distinct names, got {names}")
        usable = planner.usable(index)
        self.skipped = int(len(index) - usable.sum())
        if not usable.any():
            raise ValueError(f"{index.root}: none of the {len(index)} records serves the views {names}")
        self.index = index if self.skipped == 0 else index.select(usable)
        self.planner = planner
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.order = Order(num_records=len(self.index), seed=seed, shuffle=shuffle, repeat=repeat, picks=picks)
        self._rank, self._world, self._drop_last = rank, world, drop_last
        self.config = (config or LoaderConfig()).resolved(_cores())
        self.stages = Stages()
        self.wait_s = 0.0
        self.augment_s = 0.0
        self.damaged: dict[int, str] = {}
        self._shape = Shape.of(planner, self.index[0], batch_size)
        self._backend: _Threads | _Processes | None = None
        if drop_last and len(self) == 0:
            raise ValueError(
                f"{index.root}: {len(self.order)} samples an epoch do not fill one batch of {batch_size} x {world}; "
                "use a smaller batch"
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.order), self.batch_size * self._world)
        return whole if self._drop_last or rest <= self._rank * self.batch_size else whole + 1

    def set_picks(self, picks: np.ndarray | None) -> None:
        """Replace the explicit record numbers of the order from the next epoch on."""
        self.order = replace(self.order, picks=picks)
        if self._backend is not None:
            self._backend.set_order(self.order)

    def cursor(self, epoch: int, batch: int) -> Cursor:
        """The state after ``batch`` batches of ``epoch``."""
        position = batch * self.batch_size * self._world
        return Cursor(seed=self.order.seed, epoch=epoch, position=position, index_digest=self.index.digest)

    def epoch(self, epoch: int = 0, position: int = 0) -> Iterator[ClipBatch]:
        """Batches of one epoch, from global position ``position`` on."""
        jobs = self._jobs(epoch, position)
        if self._backend is None:
            kind = _Processes if self.config.processes else _Threads
            self._backend = kind(self.index, self.planner, self.order, self._shape, self.config)
        backend = self._backend
        pending: deque[tuple[Job, int, Future[tuple[Filled, Slot]]]] = deque()
        free = deque(range(self.config.ahead + 1))
        try:
            exhausted = False
            while True:
                while free and not exhausted:
                    job = next(jobs, None)
                    if job is None:
                        exhausted = True
                    else:
                        number = free.popleft()
                        pending.append((job, number, backend.submit(job, number)))
                if not pending:
                    return
                job, number, future = pending.popleft()
                start_s = time.perf_counter()
                filled, slot = future.result()
                self.wait_s += time.perf_counter() - start_s
                self._account(filled)
                batch = self._deliver(job, slot, filled.stages.payload_bytes)
                free.append(number)
                yield batch
        finally:
            for _, _, future in pending:
                future.exception()  # let running work leave the slots before they are used again

    def close(self) -> None:
        """Stop threads and processes and free the ring; the loader can be used again."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _jobs(self, epoch: int, position: int) -> Iterator[Job]:
        step = self.batch_size * self._world
        stop = len(self.order) // step * step if self._drop_last else len(self.order)
        for start in range(position, stop, step):
            mine = start + self._rank * self.batch_size
            count = min(self.batch_size, stop - mine)
            if count > 0:
                yield Job(epoch, mine, count, start // step)

    def _account(self, filled: Filled) -> None:
        self.stages.add(filled.stages)
        self.damaged.update(filled.damaged)
        allowed = max(1, int(self.config.max_damaged * len(self.index)))
        if len(self.damaged) > allowed:
            number, reason = next(iter(filled.damaged.items()))
            raise DamageBudgetError(
                f"{self.index.root}: {len(self.damaged)} damaged records, {allowed} allowed (max_damaged="
                f"{self.config.max_damaged}); the last: record {number}: {reason}. Run `clipmill verify`"
            )

    def _deliver(self, job: Job, slot: Slot, payload_bytes: int) -> ClipBatch:
        """From a full slot to a batch on the device; the slot is free afterwards."""
        start_s = time.perf_counter()
        count = job.count
        samples = slot.samples[:count].copy()
        payload = torch.from_numpy(slot.payload[:payload_bytes]).to(self.device)
        batch_key = BatchPlanner.batch_key(self.order.seed, job)
        video: dict[str, Tensor] = {}
        audio: dict[str, Tensor] = {}
        for view in self.planner.views:
            if isinstance(view.augment, VideoSpec):
                items = slot.items[view.name][:count]
                params = op_params(view.augment, samples["draw"], items.shape[1], batch_key, view.key)
                video[view.name] = augment(payload, items, view.augment, params)
            else:
                assert isinstance(view.augment, AudioSpec)
                pcm = torch.from_numpy(slot.sound[view.name][:count].copy()).to(self.device)
                audio[view.name] = waveform_to_view(pcm, self._audio_hz, view, samples["draw"])
        batch = ClipBatch(
            video=video,
            audio=audio,
            index=torch.from_numpy(samples["index"].copy()).to(self.device),
            uid=torch.from_numpy(samples["uid"].astype(np.int64)).to(self.device),
            label=torch.from_numpy(samples["label"].copy()).to(self.device),
            start_s={name: torch.from_numpy(values[:count].copy()) for name, values in slot.start_s.items()},
            aux={name: torch.from_numpy(values[:count].copy()).to(self.device) for name, values in slot.aux.items()},
        )
        self.augment_s += time.perf_counter() - start_s
        return batch

    @property
    def _audio_hz(self) -> int:
        rates = np.unique(self.index.column("audio_hz"))
        rates = rates[rates > 0]
        if len(rates) > 1:
            raise ValueError(f"{self.index.root}: sound at several rates {rates.tolist()} Hz; pack with one --audio-hz")
        return int(rates[0]) if len(rates) else 16000


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Threads:
    """Decode threads in this process; slots are ordinary memory that grows when a batch needs more."""

    def __init__(self, index: ShardIndex, planner: Planner, order: Order, shape: Shape, config: LoaderConfig) -> None:
        self._shape = shape
        self._engine = Engine(index, planner, order, shape, threads=config.threads, decoder=config.decoder)
        self._buffers: dict[int, np.ndarray] = {}

    def submit(self, job: Job, number: int) -> Future[tuple[Filled, Slot]]:
        result: Future[tuple[Filled, Slot]] = Future()
        slots: list[Slot] = []

        def grow(size: int) -> Slot:
            buffer = self._buffers.get(number)
            if buffer is None or len(buffer) < size:
                buffer = self._buffers[number] = np.empty(size * 5 // 4, np.uint8)
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
        self._engine.set_order(order)

    def close(self) -> None:
        self._engine.close()
        self._buffers.clear()


class _Processes:
    """Decode processes; slots are shared memory."""

    def __init__(self, index: ShardIndex, planner: Planner, order: Order, shape: Shape, config: LoaderConfig) -> None:
        self._shape = shape
        self._workers = [
            WorkerProcess(index, planner, order, shape, threads=config.threads, decoder=config.decoder)
            for _ in range(config.processes)
        ]
        self._buffers = [SharedBuffer() for _ in range(config.ahead + 1)]

    def submit(self, job: Job, number: int) -> Future[tuple[Filled, Slot]]:
        result: Future[tuple[Filled, Slot]] = Future()
        buffer = self._buffers[number]

        def relay(done: Future[tuple[Filled, int]]) -> None:
            error = done.exception()
            if error is not None:
                result.set_exception(error)
            else:
                filled, size = done.result()
                result.set_result((filled, Slot(buffer.fit(size), self._shape)))

        self._workers[job.number % len(self._workers)].submit(job, buffer.path).add_done_callback(relay)
        return result

    def set_order(self, order: Order) -> None:
        for worker in self._workers:
            worker.set_order(order)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        for buffer in self._buffers:
            buffer.unlink()
