"""Tracks without contestants: the augment kernel, a training step, and a long soak."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from clipmill.tools.bench.corpus import Data
from clipmill.tools.bench.peer import BATCH, SIZE, memory_mb
from clipmill.tools.bench.tracks import Setting, Table, cores

if TYPE_CHECKING:
    import torch

_COUNTED_FROM = 0.2  # share of a soak after which buffers have their final size


def augmenting(setting: Setting, data: Data, device: str) -> Table:
    """The fused kernel on full slots: bytes that it must move per second, against a plain copy on the device."""
    import torch

    from clipmill.pipeline.augment import op_params
    from clipmill.pipeline.draws import fold
    from clipmill.pipeline.kernels import bytes_moved, render, steps_of
    from clipmill.pipeline.slot import crop_table
    from clipmill.pipeline.spec import Flip, Normalize, RandomResizedCrop, VideoSpec, simclr
    from clipmill.pipeline.views import View

    torch.set_num_threads(1)
    record, place = data.index[0], torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    block = torch.empty(64 << 20, dtype=torch.uint8, device=place)
    target = torch.empty_like(block)
    copy_gb_s = 2 * block.numel() / _each(lambda: target.copy_(block), place) / 1e9
    facts: dict[str, Any] = {"device": place.type, "dtype": str(dtype).removeprefix("torch."), "copy_gb_s": copy_gb_s}
    specs = {
        "crop_flip": VideoSpec(size=SIZE, crop=RandomResizedCrop(), ops=(Flip(), Normalize())),
        "simclr": simclr(SIZE),
    }
    for name, spec in specs.items():
        setting.say(f"augment: {name}")
        keys = np.array([fold(0, number) for number in range(BATCH)], np.uint64)
        shape = np.zeros((BATCH, 16), np.int64), np.full(BATCH, record.height), np.full(BATCH, record.width)
        items = crop_table(View(name="v", num_frames=16, augment=spec), keys, *shape)
        sizes = (items["w"].astype(np.int64) * items["h"] * 3 // 2).reshape(-1)
        items["offset"] = (np.cumsum(sizes) - sizes).reshape(items.shape)
        payload = torch.from_numpy(np.random.default_rng(0).integers(16, 235, int(sizes.sum()), np.uint8)).to(place)
        params = op_params(spec, keys, 16, fold(0, "batch"), "v")
        steps = steps_of(items, spec, params, place)
        tables = tuple(
            torch.from_numpy(np.ascontiguousarray(t).view(np.uint8).ravel()).to(place) for t in (items, steps)
        )
        used = {"steps": steps, "tables": (tables[0], tables[1]), "dtype": dtype}
        seconds = _each(lambda p=payload, i=items, s=spec, q=params, u=used: render(p, i, s, q, **u), place)
        gb_s = bytes_moved(items, spec, dtype) / seconds / 1e9
        facts |= {f"{name}_clips_s": BATCH / seconds, f"{name}_gb_s": gb_s, f"{name}_of_copy": gb_s / copy_gb_s}
    return Table("augment", data.name, "16 frames", [], facts)


def _each(work: Callable[[], object], place: torch.device, seconds: float = 1.0) -> float:
    """Seconds of one call, best of several, after a first one that is not counted."""
    import torch

    def once() -> float:
        start_s = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - start_s

    once()
    times = [once()]
    while sum(times) < seconds:
        times.append(once())
    return min(times)


def stepping(setting: Setting, data: Data, device: str, steps: int) -> Table:
    """From the disk to an optimiser step of R3D-18, 16 x 112 x 112: share of waiting; and one batch over and over."""
    import torch

    from clipmill.models.encoder import build_encoder
    from clipmill.pipeline.loader import Loader
    from clipmill.pipeline.spec import Flip, Normalize, RandomResizedCrop, VideoSpec
    from clipmill.pipeline.views import Clips, View

    place = torch.device(device)
    on_gpu = place.type == "cuda"
    batch, dtype = (BATCH, torch.bfloat16) if on_gpu else (2, torch.float32)
    torch.set_num_threads(len(cores()))
    spec = VideoSpec(size=SIZE, crop=RandomResizedCrop(), ops=(Flip(), Normalize()))
    planner = Clips(views=(View(name="clip", num_frames=16, augment=spec),))
    model = build_encoder("r3d_18").to(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(x_BCTHW: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place.type, torch.bfloat16, enabled=on_gpu):
            loss = model(x_BCTHW).square().mean()
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize(place)

    repeat = -(-(steps + 2) * batch // len(data.index))
    with Loader(data.index, planner, batch_size=batch, repeat=repeat, device=place, dtype=dtype) as loader:
        stream = loader.epoch()
        for _ in range(2):
            x_BCTHW = next(stream).video["clip"]
            step(x_BCTHW)
        waited_s, start_s = loader.wait_s, time.perf_counter()
        for number in range(steps):
            setting.say(f"step: {number + 1} of {steps}")
            step(next(stream).video["clip"])
        wall_s = time.perf_counter() - start_s
        waited_s = loader.wait_s - waited_s
        facts: dict[str, Any] = {"device": place.type, "batch": batch, "clips_s": steps * batch / wall_s}
        facts |= {"wait_share": waited_s / wall_s, "augment_share": loader.augment_s / wall_s}
    start_s = time.perf_counter()
    for _ in range(steps):
        step(x_BCTHW)
    facts["synthetic_clips_s"] = steps * batch / (time.perf_counter() - start_s)
    return Table("step", data.name, "16 frames, stride 1", [], facts)


def soak(setting: Setting, data: Data, clips: int) -> Table:
    """Serve many clips in one loader and watch the memory; small pictures do, they take the same path."""
    from clipmill.pipeline.loader import Loader, LoaderConfig
    from clipmill.pipeline.views import Clips, View

    planner = Clips(views=(View(name="clip", num_frames=16),))
    repeat = -(-clips // len(data.index))
    loader = Loader(data.index, planner, batch_size=BATCH, repeat=repeat, config=LoaderConfig(processes=0))
    points: list[tuple[int, float]] = []
    start_s, every = time.perf_counter(), max(clips // 50 // BATCH, 1) * BATCH
    with loader:
        for number, _ in enumerate(loader.slots(), 1):
            if number * BATCH % every == 0:
                points.append((number * BATCH, memory_mb()))
                setting.say(f"soak: {number * BATCH} of {clips} clips, {points[-1][1]:.0f} MB")
            if number * BATCH >= clips:
                break
    wall_s = time.perf_counter() - start_s
    settled = np.array([point for point in points if point[0] >= clips * _COUNTED_FROM] or points)
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) if len(settled) > 1 else 0.0
    facts = {
        "clips": clips,
        "clips_s": clips / wall_s,
        "first_mb": float(settled[0, 1]),
        "last_mb": float(settled[-1, 1]),
        "most_mb": float(settled[:, 1].max()),
        "slope_mb_per_10000_clips": slope * 10_000,
        "damaged": len(loader.damaged),
    }
    return Table("soak", data.name, "16 frames, stride 1", [], facts)
