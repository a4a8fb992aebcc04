"""The forecast of `pretrain --plan` against runs that really happen."""

from __future__ import annotations

import time

import pytest

from clipmill.models.encoder import EncoderConfig
from clipmill.models.methods.moco import Config, MoCo
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.loader import Loader
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig
from clipmill.tools.pretrain_forecast import Measured, forecast_of, measure
from clipmill.tools.simulate import WhatIf

ONE_THREAD = LoaderConfig(threads=1, processes=0)
BATCH = 4


def small() -> MoCo:
    return MoCo(Config(encoder=EncoderConfig(name="r3d_18", width=0.125), num_frames=4, size=32, queue_size=8))


def measured(dataset: ShardIndex, step_ms: float = 0.0) -> Measured:
    train = TrainConfig(batch_size=BATCH, device="cpu", tensorboard=False)
    return measure(small(), dataset, train, ONE_THREAD, part=BATCH, input_bytes=1, step_ms=step_ms)


def test_costs_are_measured_and_forecast(dataset: ShardIndex) -> None:
    found = measured(dataset)
    assert found.device_s is not None
    assert 1e-5 < found.decode_s < 1
    assert 1e-3 < found.device_s < 10
    assert found.upload_bytes >= BATCH * 2 * 4 * 32 * 32  # two views of four frames, at least their luma
    assert found.step_cores > 0
    forecast, machine = forecast_of(found, ONE_THREAD, WhatIf(cores=2, read_mb_s=1e3), part=BATCH, read_bytes=1e4)
    assert (machine.threads, machine.read_bytes_s) == (1, 1e9)
    assert 0 < forecast.clips_per_s <= 1.05 * BATCH / found.device_s


@pytest.mark.parametrize("step_ms", [1.0, 60.0])  # the loader sets the pace, or the device does
def test_a_real_run_goes_as_fast_as_forecast(dataset: ShardIndex, step_ms: float) -> None:
    method = small()
    ratios = []
    for _ in range(4):  # side by side, or other work on the machine would decide
        found = measured(dataset, step_ms)
        forecast, _ = forecast_of(found, ONE_THREAD, WhatIf(step_ms=step_ms), part=BATCH, read_bytes=0)
        with Loader(dataset, method.plan(), batch_size=BATCH, repeat=16, config=ONE_THREAD) as source:
            times_s = []
            for _ in source.slots():
                time.sleep(step_ms / 1e3)
                times_s.append(time.perf_counter())
        warm = len(times_s) // 4
        real = (len(times_s) - 1 - warm) * BATCH / (times_s[-1] - times_s[warm])
        ratios.append(real / forecast.clips_per_s)
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2, ratios
