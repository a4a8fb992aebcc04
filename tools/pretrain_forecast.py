"""The forecast of ``clipmill pretrain --plan``: what is measured here in a few seconds, and what follows from it."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig
from clipmill.tools.simulate import Forecast, Machine, WhatIf, Work, simulate

if TYPE_CHECKING:
    from clipmill.models.method import Method

_TRIED_ON_CPU = 64 << 20  # bytes of input per step; more would take long and much memory
_RECORDS = 256  # at least, so that methods which look at the whole corpus have something to look at
_BATCHES = 3
_MEASURED_S = 0.5  # of decoding, at least, as far as there is enough
_REPEAT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """decode_s: thread time per clip. upload_bytes: per batch. device_s: per batch, None = not tried. device: its
    name. step_cores: cores a step keeps busy, 0 = an accelerator."""

    decode_s: float
    upload_bytes: float
    device_s: float | None
    device: str
    step_cores: int


def forecast_rows(
    method: Method,
    index: ShardIndex,
    train: TrainConfig,
    loader: LoaderConfig,
    what_if: WhatIf,
    *,
    part: int,
    read_bytes: float,
    input_bytes: int,
) -> list[tuple[str, str]]:
    """Rows of the plan: what was measured, the rate that keeps the device busy, and the rate to expect.

    index: usable records. part: samples per forward pass of a process. read_bytes: per sample. input_bytes: of a part.
    """
    found = measure(method, index, train, loader, part=part, input_bytes=input_bytes, step_ms=what_if.step_ms)
    here = f"{1e3 * found.decode_s:.2f} ms of a decode thread per clip"
    if found.device_s is None:
        left = f"a step of {input_bytes / 2**20:.0f} MiB input is not tried on this CPU; give --what-if.step-ms"
        return [("measured", here), ("forecast", left)]
    source = "given" if what_if.step_ms else f"measured on {found.device}"
    forecast, machine = forecast_of(found, loader, what_if, part=part, read_bytes=read_bytes)
    decoders = f"{machine.threads} decode threads on {machine.cores} cores"
    return [
        ("measured", here),
        ("step", f"{1e3 * found.device_s:.0f} ms for {part} samples ({source})"),
        ("to keep busy", f"{part / found.device_s:.1f} clips/s"),
        ("forecast", f"{forecast.clips_per_s:.1f} clips/s per process with {decoders}"),
        ("", f"wait {100 * forecast.wait_share:.0f} %; the pace is set by: {forecast.bound}"),
    ]


def forecast_of(
    found: Measured, loader: LoaderConfig, what_if: WhatIf, *, part: int, read_bytes: float
) -> tuple[Forecast, Machine]:
    """The simulated rate of one process, and the machine it is for."""
    assert found.device_s is not None
    cores = what_if.cores or len(os.sched_getaffinity(0))
    resolved = loader.resolved(cores)
    machine = Machine(
        cores=cores,
        threads=resolved.threads * max(resolved.processes, 1),
        ahead=resolved.ahead,
        read_bytes_s=what_if.read_mb_s * 1e6 or math.inf,
        latency_s=what_if.latency_ms / 1e3,
        requests=what_if.requests,
        upload_bytes_s=what_if.upload_gb_s * 1e9 or math.inf,
        step_cores=found.step_cores,
    )
    work = Work(
        clips=part,
        read_bytes=read_bytes,
        decode_s=found.decode_s,
        upload_bytes=found.upload_bytes,
        device_s=found.device_s,
    )
    return simulate(work, machine), machine


def measure(
    method: Method,
    index: ShardIndex,
    train: TrainConfig,
    loader: LoaderConfig,
    *,
    part: int,
    input_bytes: int,
    step_ms: float = 0.0,
) -> Measured:
    """Decode some batches, then take some steps of a real run on few records in a temporary folder."""
    import torch

    decode_s, upload_bytes = _decoding(method, index, train, loader, part)
    if step_ms:
        return Measured(
            decode_s=decode_s, upload_bytes=upload_bytes, device_s=step_ms / 1e3, device="given", step_cores=0
        )
    cuda = torch.cuda.is_available() and train.device != "cpu"
    device_s = None
    if cuda or input_bytes <= _TRIED_ON_CPU:
        device_s = _stepping(method, index, train, loader)
    return Measured(
        decode_s=decode_s,
        upload_bytes=upload_bytes,
        device_s=device_s,
        device=torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        step_cores=0 if cuda else torch.get_num_threads(),
    )


def _decoding(
    method: Method, index: ShardIndex, train: TrainConfig, loader: LoaderConfig, part: int
) -> tuple[float, float]:
    """Thread time per clip and bytes per batch, of one decode thread that has the machine for itself."""
    from clipmill.pipeline.loader import Loader

    alone = replace(loader, threads=1, processes=0, cache_gb=0.0)
    options: dict[str, Any] = {"seed": train.seed, "repeat": _REPEAT, "drop_last": False}
    spent_s, clips, sizes = [], [], []
    with Loader(index, method.plan(), batch_size=min(part, len(index)), config=alone, **options) as source:
        for _, _, payload_bytes in source.slots():
            stages = source.stages
            spent_s.append(stages.plan_s + stages.read_s + stages.decode_s + stages.copy_s)
            clips.append(stages.clips)
            sizes.append(payload_bytes)
            if len(sizes) > _BATCHES and spent_s[-1] - spent_s[0] > _MEASURED_S:
                break
    if len(sizes) > 1:  # the first batch opened files and decoders
        return (spent_s[-1] - spent_s[0]) / (clips[-1] - clips[0]), float(np.mean(sizes))
    return spent_s[0] / clips[0], float(sizes[0])


def _stepping(method: Method, index: ShardIndex, train: TrainConfig, loader: LoaderConfig) -> float:
    """Seconds of augmentation and step of a part of a batch, while nothing is decoded."""
    from clipmill.pipeline.log import read_log
    from clipmill.pipeline.train import train as run

    wanted = max(_RECORDS, _BATCHES * train.batch_size)
    few = index.select(np.arange(min(wanted, len(index))))
    short = replace(
        train,
        epochs=1,
        repeat=max(1, math.ceil(_BATCHES * train.batch_size / len(few))),
        warmup_epochs=0.0,
        schedule="constant",
        log_every=1,
        checkpoint_every=10**9,
        tensorboard=False,
    )
    with tempfile.TemporaryDirectory(prefix="clipmill-plan-") as folder:
        run(method, few, short, Path(folder), loader=replace(loader, cache_gb=0.0), verbose=False)
        rows = read_log(Path(folder))
    return min(row["step_s"] + row["augment_s"] for row in rows[1:] or rows) / train.accumulate
