"""The loader: a ring of slots that decode threads or processes fill in order, and the step from slot to device.

cursor -> order -> plan -> [slot: read + decode + copy] -> one copy to the device -> augment -> ClipBatch
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.audio import waveform_to_view
from clipmill.pipeline.augment import op_params
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.cache import FrameCache
from clipmill.pipeline.fill import Filled, Stages
from clipmill.pipeline.kernels import render, steps_of
from clipmill.pipeline.order import Cursor, Order
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig, ProcessRing, ThreadRing
from clipmill.pipeline.slot import SAMPLE, BatchPlanner, Job, Shape, Slot
from clipmill.pipeline.spec import AudioSpec, Params, VideoSpec
from clipmill.pipeline.transfer import Transfer
from clipmill.pipeline.views import Planner

__all__ = ["DamageBudgetError", "Loader", "LoaderConfig"]


class DamageBudgetError(RuntimeError):
    """More records are damaged than the run allows."""


class Loader:
    """Streams `ClipBatch` es of a planner's views over an index.

    batch_size: samples per process. rank, world: this process's share: of every global batch of batch_size * world
    positions it takes its own block, so the samples of a global batch do not depend on ``world``. drop_last: leave
    out an incomplete last batch; otherwise the last batch is smaller and no sample is repeated. dtype: of the video.

    Attributes: ``stages`` (`Stages`, sums since construction), ``wait_s`` (time the caller was blocked),
    ``augment_s``, ``damaged`` ({record number: reason}), ``cache`` (`FrameCache` while open, if any).
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
        dtype: torch.dtype = torch.float32,
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
        self.dtype = dtype
        self._transfer = Transfer(torch.device(device))
        self.device = self._transfer.device
        self.order = Order(num_records=len(self.index), seed=seed, shuffle=shuffle, repeat=repeat, picks=picks)
        self._rank, self._world, self._drop_last = rank, world, drop_last
        self.config = (config or LoaderConfig()).resolved(_cores())
        if index.url:  # every process fetches its next batch while it decodes one
            self.config = replace(self.config, ahead=max(self.config.ahead, 2 * self.config.processes))
        self.stages = Stages()
        self.wait_s = 0.0
        self.augment_s = 0.0
        self.damaged: dict[int, str] = {}
        self.cache: FrameCache | None = None
        self._shape = Shape.of(planner, self.index[0], batch_size)
        self._ring: ThreadRing | ProcessRing | None = None
        self._next: Future[tuple[Filled, Slot]] | None = None  # the slot after the one being delivered
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
        if self._ring is not None:
            self._ring.set_order(self.order)

    def cursor(self, epoch: int, batch: int) -> Cursor:
        """The state after ``batch`` batches of ``epoch``."""
        position = batch * self.batch_size * self._world
        return Cursor(seed=self.order.seed, epoch=epoch, position=position, index_digest=self.index.digest)

    def epoch(self, epoch: int = 0, position: int = 0) -> Iterator[ClipBatch]:
        """Batches of one epoch, from global position ``position`` on."""
        return self._transfer.ahead(self._batches(self._jobs(epoch, position)), self._next_is_full)

    def _next_is_full(self) -> bool:
        return self._next is None or self._next.done()

    def _batches(self, jobs: Iterator[Job]) -> Generator[ClipBatch, None, None]:
        for job, slot, payload_bytes in self._slots(jobs):
            yield self._deliver(job, slot, payload_bytes)

    def slots(self, epoch: int = 0, position: int = 0) -> Iterator[tuple[Job, Slot, int]]:
        """What `epoch` makes its batches of: (job, full slot, bytes of its payload). Valid until the next one."""
        return self._slots(self._jobs(epoch, position))

    def _slots(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Slot, int]]:
        ring = self._open()
        pending: deque[tuple[Job, int, Future[tuple[Filled, Slot]]]] = deque()
        free = deque(range(self.config.ahead + 1))
        leaving: deque[tuple[torch.cuda.Event | None, int]] = deque()
        job = next(jobs, None)
        try:
            while job is not None or pending:
                while leaving and (leaving[0][0] is None or leaving[0][0].query() or not (free or pending)):
                    event, number = leaving.popleft()
                    if event is not None:
                        event.synchronize()
                    free.append(number)
                while free and job is not None:
                    number = free.popleft()
                    pending.append((job, number, ring.submit(job, number)))
                    job = next(jobs, None)
                done, number, future = pending.popleft()
                start_s = time.perf_counter()
                filled, slot = future.result()
                self.wait_s += time.perf_counter() - start_s
                self._account(filled)
                self._next = pending[0][2] if pending else None
                yield done, slot, filled.stages.payload_bytes
                leaving.append((self._transfer.mark(), number))
        finally:
            for _, _, future in pending:
                future.exception()  # let running work leave the slots before they are used again
            self._transfer.settle()

    def _open(self) -> ThreadRing | ProcessRing:
        if self._ring is None:
            if self.config.cache_gb > 0:
                self.cache = FrameCache(self.index, int(self.config.cache_gb * 2**30))
            kind = ProcessRing if self.config.processes else ThreadRing
            self._ring = kind(
                self.index, self.planner, self.order, self._shape, self.config, self._transfer, self.cache
            )
        return self._ring

    def close(self) -> None:
        """Stop threads and processes and free the ring and the cache; the loader can be used again."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self.cache is not None:
            self.cache.close()
            self.cache = None

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
        allowed = self.config.allowed_damage(len(self.index))
        if len(self.damaged) > allowed:
            number, reason = next(iter(filled.damaged.items()))
            raise DamageBudgetError(
                f"{self.index.root}: {len(self.damaged)} damaged records, {allowed} allowed (max_damaged="
                f"{self.config.max_damaged}); the last: record {number}: {reason}. Run `clipmill verify`"
            )

    def _deliver(self, job: Job, slot: Slot, payload_bytes: int) -> ClipBatch:
        """From a full slot to a batch on the device; the slot is free when the upload has left it."""
        start_s = time.perf_counter()
        count = job.count
        draws = slot.samples["draw"][:count].copy()
        batch_key = BatchPlanner.batch_key(self.order.seed, job)
        params: dict[str, list[Params]] = {}
        for view in self.planner.views:
            if isinstance(view.augment, VideoSpec):
                items = slot.items[view.name][:count]
                params[view.name] = op_params(view.augment, draws, items.shape[1], batch_key, view.key)
                made = steps_of(items, view.augment, params[view.name], self.device)
                slot.steps[view.name][: len(made)] = 0.0
                slot.steps[view.name][: len(made), : made.shape[1]] = made
        sent = self._transfer.upload(slot.used(payload_bytes))
        payload = sent.at(slot.payload[:payload_bytes])
        video: dict[str, Tensor] = {}
        audio: dict[str, Tensor] = {}
        for view in self.planner.views:
            if isinstance(view.augment, VideoSpec):
                items = slot.items[view.name][:count]
                steps = slot.steps[view.name][: items.size if view.augment.per_frame else count]
                tables = sent.at(items), sent.at(steps)
                video[view.name] = render(
                    payload, items, view.augment, params[view.name], steps=steps, tables=tables, dtype=self.dtype
                )
            else:
                assert isinstance(view.augment, AudioSpec)
                pcm = sent.at(slot.sound[view.name][:count]).view(torch.int16).view(count, -1)
                audio[view.name] = waveform_to_view(pcm, self._audio_hz, view, draws)
        samples = sent.at(slot.samples[:count]).view(torch.int64).view(count, -1)
        columns = {name: samples[:, place].clone() for place, name in enumerate(SAMPLE.names or ())}
        batch = ClipBatch(
            video=video,
            audio=audio,
            index=columns["index"],
            uid=columns["uid"],
            label=columns["label"],
            start_s={name: torch.from_numpy(values[:count].copy()) for name, values in slot.start_s.items()},
            aux={name: sent.at(values[:count]).view(torch.float64).clone() for name, values in slot.aux.items()},
        )
        self.augment_s += time.perf_counter() - start_s
        return batch

    @cached_property
    def _audio_hz(self) -> int:
        rates = np.unique(self.index.column("audio_hz"))
        rates = rates[rates > 0]
        if len(rates) > 1:
            raise ValueError(f"{self.index.root}: sound at several rates {rates.tolist()} Hz; pack with one --audio-hz")
        return int(rates[0]) if len(rates) else 16000


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
