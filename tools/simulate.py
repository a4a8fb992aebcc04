"""How fast a run would be on other hardware: a simulation of reads, decode threads, ring of slots and device.

Work flows as in the loader (`clipmill.pipeline.fill`, `clipmill.pipeline.ring`): a batch takes a free slot, its clips
are read, then decoded by whichever thread is free, and the device takes complete batches in order. What runs at one
time shares its resource evenly: requests the bandwidth, decode threads and a step on the CPU the cores.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

_RESOURCES = ("cores", "read", "device", "threads")  # of those in use all the time, the first one is to blame


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a batch of one process costs.

    clips: in a batch. read_bytes: of a clip. decode_s: thread time of a clip, for planning, decoding and copying.
    upload_bytes: of a batch. device_s: augmentation and optimiser step of a batch when nothing else runs.
    """

    clips: int
    read_bytes: float
    decode_s: float
    upload_bytes: float
    device_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the work runs on.

    cores: shared by decode threads and, where the device is the CPU, by the ``step_cores`` threads of a step
    (0 = an accelerator). threads: that decode. ahead: batches made in advance. read_bytes_s: bandwidth of disk or
    network; latency_s: of a request; requests: at once. upload_bytes_s: from host to device.
    """

    cores: int
    threads: int
    ahead: int = 2
    read_bytes_s: float = math.inf
    latency_s: float = 0.0
    requests: int = 8
    upload_bytes_s: float = math.inf
    step_cores: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Hardware that --plan forecasts the rate of a process for."""

    cores: int = 0
    """Cores for it; 0 = those of this machine."""
    read_mb_s: float = 0.0
    """MB/s that disk or network give; 0 = no limit."""
    latency_ms: float = 0.0
    """Milliseconds until the first byte of a read."""
    requests: int = 8
    """Reads at once."""
    upload_gb_s: float = 0.0
    """GB/s from host to device; 0 = no limit."""
    step_ms: float = 0.0
    """Milliseconds of augmentation and step of a batch on an accelerator; 0 = as measured here."""

    def __post_init__(self) -> None:
        for name in ("cores", "read_mb_s", "latency_ms", "upload_gb_s", "step_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"--what-if.{name.replace('_', '-')} = {getattr(self, name)} must be at least 0")
        if self.requests < 1:
            raise ValueError(f"--what-if.requests = {self.requests} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """clips_per_s: of this process. wait_share: of the time, the device had no batch. busy: share of the time that
    each resource (cores, read, device, threads) was in use; bound: the one that sets the pace."""

    clips_per_s: float
    wait_share: float
    busy: dict[str, float]

    @property
    def bound(self) -> str:
        """The resource that sets the pace."""
        most = max(self.busy.values())
        return next(name for name in _RESOURCES if self.busy[name] > 0.98 * most)


@dataclass(slots=True)
class _Clip:
    batch: int
    latency_s: float
    read_bytes: float
    decode_s: float


def simulate(work: Work, machine: Machine, batches: int = 0) -> Forecast:
    """The forecast over ``batches`` batches (0 = enough), the first quarter of which only fill the pipeline.

    >>> work = Work(clips=10, read_bytes=0, decode_s=0.01, upload_bytes=0, device_s=0.5)
    >>> round(simulate(work, Machine(cores=4, threads=2)).clips_per_s)  # the device needs longer than the threads
    20
    """
    batches = batches or max(4 * machine.ahead + 8, min(48, 8000 // work.clips))
    waiting: deque[_Clip] = deque()  # not yet asked for
    reading: list[_Clip] = []
    read: deque[_Clip] = deque()
    decoding: list[_Clip] = []
    left = dict.fromkeys(range(batches), work.clips)
    submitted, taken, done, free = 0, 0, 0, machine.ahead + 1
    upload_s = device_s = 0.0
    now_s, warm_s, warm = 0.0, 0.0, batches // 4
    busy = dict.fromkeys(_RESOURCES, 0.0)
    while done < batches:
        while free and submitted < batches:
            waiting += [_Clip(submitted, machine.latency_s, work.read_bytes, work.decode_s) for _ in range(work.clips)]
            submitted, free = submitted + 1, free - 1
        while waiting and len(reading) < machine.requests:
            reading.append(waiting.popleft())
        while read and len(decoding) < machine.threads:
            decoding.append(read.popleft())
        idle = not upload_s and not device_s
        if idle and taken < submitted and not left[taken]:
            taken += 1
            upload_s, device_s = work.upload_bytes / machine.upload_bytes_s, work.device_s
            idle = False
        stepping = machine.step_cores if device_s and not upload_s else 0
        units = len(decoding) + stepping
        speed = min(1.0, machine.cores / units) if units else 1.0
        moving = [clip for clip in reading if not clip.latency_s]
        bandwidth = machine.read_bytes_s / max(len(moving), 1)
        on_cpu = speed if machine.step_cores else 1.0
        ends = [clip.latency_s for clip in reading if clip.latency_s]
        ends += [clip.read_bytes / bandwidth for clip in moving]
        ends += [clip.decode_s / speed for clip in decoding]
        if not idle:
            ends.append(upload_s if upload_s else device_s / on_cpu)
        step_s = min(ends)
        now_s += step_s
        if done >= warm:
            busy["read"] += step_s * bool(reading)
            busy["threads"] += step_s * len(decoding) / machine.threads
            busy["cores"] += step_s * min(units, machine.cores) / machine.cores
            busy["device"] += step_s * (not idle)
        if not idle:
            if upload_s:
                upload_s = _less(upload_s, step_s)
            else:
                device_s = _less(device_s, step_s * on_cpu)
            if not upload_s and not device_s:
                done, free = done + 1, free + 1
                warm_s = now_s if done == warm else warm_s
        for clip in reading:
            if clip.latency_s:
                clip.latency_s = _less(clip.latency_s, step_s)
        for clip in moving:
            clip.read_bytes = _less(clip.read_bytes, step_s * bandwidth)
        for clip in decoding:
            clip.decode_s = _less(clip.decode_s, step_s * speed)
        read += [clip for clip in reading if not clip.latency_s and not clip.read_bytes]
        reading = [clip for clip in reading if clip.latency_s or clip.read_bytes]
        for clip in decoding:
            left[clip.batch] -= not clip.decode_s
        decoding = [clip for clip in decoding if clip.decode_s]
    span_s = max(now_s - warm_s, 1e-12)
    shares = {name: seconds / span_s for name, seconds in busy.items()}
    return Forecast(
        clips_per_s=(batches - warm) * work.clips / span_s, wait_share=max(0.0, 1 - shares["device"]), busy=shares
    )


def _less(amount: float, spent: float) -> float:
    """What is left; nothing where that is rounding."""
    rest = amount - spent
    return rest if rest > 1e-9 * amount else 0.0
