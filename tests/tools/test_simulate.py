"""The simulation against cases that can be computed by hand, and its invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clipmill.tools.simulate import Machine, WhatIf, Work, simulate

WORK = Work(clips=10, read_bytes=1e5, decode_s=0.01, upload_bytes=2e6, device_s=0.01)
MACHINE = Machine(cores=8, threads=4)


@pytest.mark.parametrize(
    ("work", "machine", "clips_per_s", "bound"),
    [
        (replace(WORK, device_s=0.5), MACHINE, 10 / 0.5, "device"),
        (WORK, MACHINE, 4 / 0.01, "threads"),
        (WORK, replace(MACHINE, cores=2), 2 / 0.01, "cores"),  # four threads on two cores
        (WORK, replace(MACHINE, read_bytes_s=1e7), 1e7 / 1e5, "read"),
        (WORK, replace(MACHINE, upload_bytes_s=1e7), 10 / (0.01 + 2e6 / 1e7), "device"),
        (replace(WORK, read_bytes=0), replace(MACHINE, latency_s=0.5, requests=2, ahead=9), 2 / 0.5, "read"),
        # a step on two of two cores: nothing overlaps, so the core time of both adds up
        (replace(WORK, device_s=0.1), Machine(cores=2, threads=2, step_cores=2), 10 / (0.1 + 10 * 0.01 / 2), "cores"),
    ],
)
def test_the_scarcest_resource_sets_the_pace(work: Work, machine: Machine, clips_per_s: float, bound: str) -> None:
    forecast = simulate(work, machine)
    assert forecast.clips_per_s == pytest.approx(clips_per_s, rel=0.05)
    assert forecast.bound == bound
    assert all(0 <= share <= 1.001 for share in forecast.busy.values())


def test_the_device_waits_for_what_others_are_too_slow_for() -> None:
    assert simulate(replace(WORK, device_s=0.5), MACHINE).wait_share == pytest.approx(0, abs=0.01)
    assert simulate(WORK, MACHINE).wait_share == pytest.approx(1 - 0.01 / (10 * 0.01 / 4), abs=0.02)


@pytest.mark.parametrize("change", [{"cores": 16}, {"ahead": 5}, {"read_bytes_s": 1e9}])
def test_more_of_anything_is_never_slower(change: dict[str, float]) -> None:
    work = replace(WORK, device_s=0.02)
    before = Machine(cores=4, threads=4, ahead=1, read_bytes_s=5e7, latency_s=0.005)
    assert simulate(work, replace(before, **change)).clips_per_s >= 0.98 * simulate(work, before).clips_per_s


def test_latency_is_hidden_by_work_in_advance() -> None:
    slow = replace(MACHINE, latency_s=0.02, requests=16)
    assert simulate(WORK, slow).clips_per_s > 0.9 * simulate(WORK, MACHINE).clips_per_s
    assert simulate(WORK, replace(slow, ahead=1, requests=1)).clips_per_s < 0.2 * simulate(WORK, MACHINE).clips_per_s


def test_hardware_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--what-if.read-mb-s = -1 must be at least 0"):
        WhatIf(read_mb_s=-1)
    with pytest.raises(ValueError, match=r"--what-if.requests = 0 must be at least 1"):
        WhatIf(requests=0)
