"""The training loop: loader -> method -> optimiser, with checkpoints, a log, and as many processes as there are.

State is (weights, optimiser, step); everything else is a function of the seed and the step, so a run that was killed
continues as if nothing had happened, also with another number of processes. torch's generator is seeded anew for
every forward pass from (seed, step, part, rank).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipmill.models.method import Collect, EpochContext, Method
from clipmill.pipeline import checkpoint, dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.checkpoint import TrainState
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import fold
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.log import Clock, Meter, RunLog
from clipmill.pipeline.optim import build_optimizer, set_lr
from clipmill.pipeline.order import Cursor
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.views import Planner

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ValueError):
    """The loss is not a number any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended.

    step: optimiser steps done in all. total: steps of the whole run. signal: what stopped it early, 0 = it is done.
    """

    step: int
    total: int
    signal: int = 0


def train(
    method: Method,
    index: ShardIndex,
    config: TrainConfig,
    run: Path,
    *,
    loader: LoaderConfig | None = None,
    resume: bool = False,
    verbose: bool = True,
    probe: Callable[[], Mapping[str, float]] | None = None,
    probe_every: int = 1,
) -> TrainResult:
    """Train ``method`` on the records of ``index`` and leave log and checkpoints in folder ``run``.

    resume: continue from the newest complete checkpoint of ``run``, if there is one. verbose: print a line per
    interval. probe: numbers for the log, asked for in the main process after every ``probe_every`` epochs and at the
    end; it must leave the method as it is. SIGTERM and SIGINT end the run after the current step with a checkpoint.
    Afterwards ``method`` holds the final weights, in every process. Raises ValueError for a configuration that does
    not fit the data or the number of processes, and NonFiniteLossError.
    """
    device = dist.setup(config.device)
    method.to(device)
    if config.channels_last == "yes" or (
        config.channels_last == "auto" and (device.type == "cpu" or config.amp != "no")
    ):
        _channels_last(method)
    if config.sync_bn:
        dist.sync_batch_norm(method, device)
    optimizer = build_optimizer(method.param_groups(), config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_loader(index, method.plan(), config, loader, device))
        per_epoch = len(source) // config.accumulate
        if per_epoch == 0:
            raise ValueError(
                f"{index.root}: {len(source.order)} samples an epoch do not fill one batch of {config.batch_size}; "
                "use a smaller batch_size"
            )
        total = config.epochs * per_epoch
        state = _restore(run, method, optimizer, scaler, config, source, per_epoch) if resume else None
        state = state or TrainState(step=0, cursor=source.cursor(0, 0))
        if config.compile:
            method.compile()
        model = _parallel(method, device)
        autocast = partial(torch.autocast, device.type, _DTYPES.get(config.amp), enabled=config.amp != "no")
        collect = partial(_collect, method, source, config, autocast)
        log = RunLog(run, resume_step=state.step, tensorboard=config.tensorboard, active=dist.is_main())
        stack.callback(log.close)
        signals = stack.enter_context(_Signals())
        meter, clock = Meter(state.sums, device), Clock(source, config.batch_size)
        watch = _LossWatch(source.index, lag=0 if device.type == "cpu" else 1)
        step, picks, notes = state.step, state.picks, dict(state.notes)
        while step < total:
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                picks = _begin_epoch(method, optimizer, config, epoch, len(source.index), collect, notes)
            source.set_picks(picks)
            method.train()
            part = 0
            for batch in source.epoch(epoch, position * config.batch_size):
                lr = set_lr(optimizer, config, step, per_epoch)
                method.step_key = fold(config.seed, step, part, "step")
                torch.manual_seed(fold(config.seed, step, part, dist.rank()))
                part += 1
                with _gradients_shared(model, part == config.accumulate):
                    with autocast():
                        output = model(batch)
                    watch.add(step, output.loss, batch)
                    scaler.scale(output.loss / config.accumulate).backward()
                meter.add({"loss": output.loss, **output.metrics})
                if part < config.accumulate:
                    continue
                part = 0
                if config.clip_grad_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(method.parameters(), config.clip_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                method.after_step(step, total)
                step += 1
                clock.tick()
                stop = dist.any_(signals.received != 0)
                probed = probe is not None and (step == total or step % (probe_every * per_epoch) == 0)
                if probe is not None and probed and dist.is_main():
                    since = time.perf_counter()
                    notes.update(probe())
                    clock.leave_out(time.perf_counter() - since)
                if probed or step % config.log_every == 0 or step == total:
                    watch.drain()
                    row = {"step": step, "epoch": epoch, "lr": lr, **meter.mean(), **notes, **clock.lap()}
                    log.row(row)
                    notes.clear()
                    if verbose and dist.is_main():
                        print(_line(row, total, clock.left_s(total - step)), flush=True)
                if stop or step == total or step % (config.checkpoint_every or per_epoch) == 0:
                    watch.drain()
                    sums = meter.reduced()
                    if dist.is_main():
                        now = _state(source, config, step, per_epoch, sums, notes, picks, scaler)
                        checkpoint.save(run, now, method, optimizer, config.keep)
                if stop and step < total:
                    return TrainResult(step=step, total=total, signal=signals.received or int(signal.SIGTERM))
                if step % per_epoch == 0:
                    break  # what is left of the epoch does not fill a step
        return TrainResult(step=step, total=total)


@contextlib.contextmanager
def _gradients_shared(model: nn.Module, share: bool) -> Iterator[None]:
    """Backward passes in here average gradients over processes only if ``share``."""
    with contextlib.nullcontext() if share or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


def _begin_epoch(
    method: Method,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    epoch: int,
    num_records: int,
    collect: Collect,
    notes: dict[str, float],
) -> np.ndarray | None:
    """Run the method's hook; returns the picks of the epoch."""
    context = EpochContext(epoch=epoch, num_epochs=config.epochs, num_records=num_records, collect=collect)
    torch.manual_seed(fold(config.seed, epoch, "epoch"))
    method.before_epoch(context)
    for param in context.renewed:
        optimizer.state.pop(param, None)
    notes.update(context.log)
    if context.picks is not None and len(context.picks) != num_records:
        raise ValueError(
            f"an epoch has {num_records} records, the method picked {len(context.picks)}; epochs must be equally long"
        )
    return None if context.picks is None else np.asarray(context.picks, np.int64)


def _loader(
    index: ShardIndex, planner: Planner, config: TrainConfig, loader: LoaderConfig | None, device: torch.device
) -> Loader:
    world, parts = dist.world(), config.accumulate
    if config.batch_size % (world * parts):
        raise ValueError(
            f"batch_size = {config.batch_size} cannot be cut into {world} processes x {parts} parts; "
            f"use a multiple of {world * parts}"
        )
    return Loader(
        index,
        planner,
        batch_size=config.batch_size // (world * parts),
        seed=config.seed,
        repeat=config.repeat,
        rank=dist.rank(),
        world=world,
        device=device,
        config=_share_of_cores(loader or LoaderConfig()),
    )


def _share_of_cores(loader: LoaderConfig) -> LoaderConfig:
    """Automatic choices for this process's share of the machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.world() > 1 else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return loader.resolved(max(1, cores // local))


def _channels_last(method: nn.Module) -> None:
    """Lay out the weights of convolutions with channels last; what they compute follows them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for param in method.parameters():
        if param.dim() in formats:
            param.data = param.data.contiguous(memory_format=formats[param.dim()])


def _parallel(method: Method, device: torch.device) -> nn.Module:
    if dist.world() == 1:
        return method
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=devices, broadcast_buffers=False)


def _cursor(source: Loader, config: TrainConfig, step: int, per_epoch: int) -> Cursor:
    epoch, position = divmod(step, per_epoch)
    digest = source.index.digest
    return Cursor(seed=config.seed, epoch=epoch, position=position * config.batch_size, index_digest=digest)


def _state(
    source: Loader,
    config: TrainConfig,
    step: int,
    per_epoch: int,
    sums: dict[str, float],
    notes: dict[str, float],
    picks: np.ndarray | None,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    cursor = _cursor(source, config, step, per_epoch)
    return TrainState(
        step=step,
        cursor=cursor,
        sums=sums,
        notes=dict(notes),
        picks=picks if cursor.position else None,  # a new epoch asks the method again
        scaler=scaler.state_dict(),
    )


def _restore(
    run: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    source: Loader,
    per_epoch: int,
) -> TrainState | None:
    found = checkpoint.complete(run)
    path = dist.gather_objects(found[-1] if found else None)[0]  # what the main process sees
    if path is None:
        return None
    state = checkpoint.restore(path, method, optimizer)
    state.cursor.check(source.index.digest)
    if state.cursor != _cursor(source, config, state.step, per_epoch):
        raise ValueError(
            f"{path}: made with another seed, batch_size or number of records than this run; "
            "resume with the same options and data"
        )
    if state.scaler and scaler.is_enabled():
        scaler.load_state_dict(state.scaler)
    return state


@torch.no_grad()
def _collect(
    method: Method,
    source: Loader,
    config: TrainConfig,
    autocast: Callable[[], torch.autocast],
    planner: Planner,
    function: Callable[[ClipBatch], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """`EpochContext.collect`: rows of the whole corpus in index order, in every process."""
    count, world, rank = len(source.index), dist.world(), dist.rank()
    size = source.batch_size
    dist.broadcast_buffers(method)  # running statistics differ between processes; all must see one network
    was_training = method.training
    method.eval()
    rows: dict[str, Tensor] = {}
    with Loader(
        source.index,
        planner,
        batch_size=size,
        seed=config.seed,
        shuffle=False,
        rank=rank,
        world=world,
        drop_last=False,
        device=source.device,
        config=source.config,
    ) as whole:
        if len(whole.index) != count:
            raise ValueError(f"{count - len(whole.index)} of {count} records lack what {planner} asks for")
        start = rank * size
        for batch in whole.epoch():
            with autocast():
                found = function(batch)
            for name, values in found.items():
                if name not in rows:
                    rows[name] = torch.zeros((count, *values.shape[1:]), dtype=values.dtype)
                rows[name][start : start + len(batch)] = values.cpu()
            start += size * world
    method.train(was_training)
    shapes = next(found for found in dist.gather_objects({n: (r.shape, r.dtype) for n, r in rows.items()}) if found)
    for name, (shape, dtype) in shapes.items():  # every row is non-zero in one process only: the sum is exact
        rows[name] = dist.sum_(rows.get(name, torch.zeros(shape, dtype=dtype)))
    return rows


class _Signals:
    """Remembers SIGTERM and SIGINT instead of dying from them; a second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        with contextlib.suppress(ValueError):  # not the main thread: signals are the caller's business
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class _LossWatch:
    """Stops the run when a loss is not finite.

    lag: losses not looked at yet, so that a device is never waited for while it works on the present step.
    """

    def __init__(self, index: ShardIndex, lag: int) -> None:
        self._index, self._lag = index, lag
        self._waiting: deque[tuple[int, Tensor, Tensor]] = deque()

    def add(self, step: int, loss: Tensor, batch: ClipBatch) -> None:
        self._waiting.append((step, loss.detach(), batch.index))
        while len(self._waiting) > self._lag:
            self._look(*self._waiting.popleft())

    def drain(self) -> None:
        """Look at all that wait."""
        while self._waiting:
            self._look(*self._waiting.popleft())

    def _look(self, step: int, loss: Tensor, rows: Tensor) -> None:
        value = loss.item()
        if not np.isfinite(value):
            keys = [self._index[int(row)].key for row in rows.tolist()]
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise NonFiniteLossError(
                f"step {step}: the loss is {value}; records: {shown}. Lower --lr, set --clip-grad-norm, or use "
                "--amp bf16 instead of fp16"
            )


def _line(row: Mapping[str, float], total: int, left_s: float) -> str:
    known = {"step", "epoch", "loss", "lr", "clips_per_s", "wait_share"}
    metrics = "".join(
        f"  {name} {value:.4g}" for name, value in row.items() if name not in known and not name.endswith("_s")
    )
    left = timedelta(seconds=round(left_s))
    return (
        f"step {row['step']}/{total}  epoch {row['epoch']}  loss {row['loss']:.4f}{metrics}  lr {row['lr']:.3g}  "
        f"{row['clips_per_s']:.1f} clips/s  wait {100 * row['wait_share']:.0f} %  ETA {left}"
    )
