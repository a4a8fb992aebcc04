"""clipmill's contestants and the floors, behind the protocol of `clipmill.tools.bench.peer`.

``clipmill``: the loader up to the full slot (8-bit planes) or, with out = float, to the normalised batch.
``clipmill RGB``: the slot's pictures also converted to RGB frames, which is what most peers give. ``decode floor``:
libavcodec through PyAV decodes exactly the frames that must be decoded, packets and context prepared, and nothing else.
``copy floor``: a copy of the bytes of the slot from memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipmill.pipeline.jit import compiled
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.views import Drawn, Span, View
from clipmill.tools.bench.peer import AUDIO_HZ, BATCH, MEAN, SIZE, STD, fingerprint, luma_to_gray, serve


@dataclass(frozen=True, slots=True)
class Given:
    """A planner that asks for what is written down: frames[draw], and a piece of sound from sounds[draw]."""

    views: tuple[View, ...]
    frames: np.ndarray
    sounds: np.ndarray | None

    def __call__(self, record: VideoRecord, rng: object, draw: int) -> Drawn:
        """See `clipmill.pipeline.views.Planner`."""
        draw %= len(self.frames)
        spans = [Span(view=self.views[0].name, frames=tuple(self.frames[draw].tolist()))]
        if self.sounds is not None:
            start, count = self.sounds[draw].tolist()
            spans.append(Span(view=self.views[1].name, start_sample=start, num_samples=count))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """All records."""
        return np.ones(len(index), bool)


def _flat(clips: list[list[int]]) -> list[int]:
    return [frame for frames in clips for frame in frames]


class Clipmill:
    """The loader. An order has more: root, threads, processes, decoder, cache_gb."""

    def __init__(self, order: dict[str, Any]) -> None:
        import torch

        from clipmill.pipeline.loader import Loader, LoaderConfig
        from clipmill.pipeline.spec import AudioSpec, Flip, Normalize, RandomResizedCrop, VideoSpec, WholeFrame

        torch.set_num_threads(order.get("torch_threads", 1))
        self.float = order["out"] == "float"
        self.rgb = order["name"].endswith("RGB")
        spec = VideoSpec(size=SIZE, crop=WholeFrame(), ops=())
        if self.float:
            spec = VideoSpec(size=SIZE, crop=RandomResizedCrop(), ops=(Flip(), Normalize(mean=MEAN, std=STD)))
        rounds = order["requests"]
        frames = np.array([[_flat(clips) for _, clips, _ in requests] for requests in rounds])
        sounds = None
        views = [View(name="clip", num_frames=frames.shape[-1], augment=spec)]
        if rounds[0][0][2]:
            seconds = np.array([[sound for _, _, sound in requests] for requests in rounds])
            sounds = np.rint(seconds * AUDIO_HZ).astype(np.int64).reshape(-1, 2)
            views.append(View(name="sound", modality="audio", duration_s=rounds[0][0][2][1], augment=AudioSpec()))
        self.loader = Loader(
            ShardIndex.open(order["root"]),
            Given(tuple(views), frames.reshape(-1, frames.shape[-1]), sounds),
            batch_size=order.get("batch", BATCH),
            shuffle=False,
            picks=np.array([file for file, _, _ in rounds[0]]),  # the same files in every round
            config=LoaderConfig(
                threads=order.get("threads", 1),
                processes=order.get("processes", 0),
                decoder=order.get("decoder", "auto"),
                cache_gb=order.get("cache_gb", 0.0),
            ),
        )

    def run(self, number: int, count: int) -> dict[str, Any]:
        """See `clipmill.tools.bench.peer.Contestant.run`."""
        loader, start_s, first_s = self.loader, time.perf_counter(), 0.0
        before = loader.stages.frames_decoded, loader.stages.frames_used, loader.stages.payload_bytes
        position = len(loader.order) - count
        for _ in loader.epoch(number, position) if self.float else self._pictures(number, position):
            first_s = first_s or time.perf_counter() - start_s
        after = loader.stages.frames_decoded, loader.stages.frames_used, loader.stages.payload_bytes
        decoded, used, size = (b - a for a, b in zip(before, after, strict=True))
        config = f"{loader.config.processes} x {loader.config.threads}" if loader.config.processes else ""
        config = config or str(loader.config.threads)
        return {"frames": used, "first_s": first_s, "decoded": decoded, "slot_bytes": size, "threads": config}

    def _pictures(self, number: int, position: int) -> Iterator[None]:
        for _, slot, size in self.loader.slots(number, position):
            if self.rgb:
                items = slot.items["clip"]
                to_rgb(slot.payload[:size], items["offset"].ravel(), int(items["h"][0, 0]), int(items["w"][0, 0]))
            yield None

    def show(self, count: int) -> list[list[list[float]]]:
        """See `clipmill.tools.bench.peer.Contestant.show`."""
        found: list[list[list[float]]] = []
        for job, slot, _ in self.loader.slots(0):
            for items in slot.items["clip"][: job.count]:
                found.append([])
                for offset, h, w in zip(*(items[name].tolist() for name in ("offset", "h", "w")), strict=True):
                    luma = slot.payload[offset : offset + h * w].reshape(h, w)
                    found[-1].append(fingerprint(luma_to_gray(luma)))
            if len(found) >= count:
                break
        return found[:count]


@compiled
def to_rgb(payload, offsets, height, width):
    """(N, 3, height, width) uint8 of I420 pictures, limited range, BT.709, 8-bit fixed point."""
    out = np.empty((len(offsets), 3, height, width), np.uint8)
    for n in range(len(offsets)):
        luma = payload[offsets[n] :]
        u = luma[height * width :]
        v = u[height * width // 4 :]
        for i in range(height):
            for j in range(width):
                y = 298 * (np.int32(luma[i * width + j]) - 16) + 128
                place = (i >> 1) * (width >> 1) + (j >> 1)
                blue, red = np.int32(u[place]) - 128, np.int32(v[place]) - 128
                out[n, 0, i, j] = min(max((y + 459 * red) >> 8, 0), 255)
                out[n, 1, i, j] = min(max((y - 55 * blue - 136 * red) >> 8, 0), 255)
                out[n, 2, i, j] = min(max((y + 541 * blue) >> 8, 0), 255)
    return out


class DecodeFloor:
    """Decodes the packets of the runs of every request and drops the frames."""

    def __init__(self, order: dict[str, Any]) -> None:
        import av

        from clipmill.pipeline.decode.runs import runs
        from clipmill.pipeline.shard import ShardReader

        index, reader = ShardIndex.open(order["root"]), ShardReader()
        self.packets: dict[int, list[av.Packet]] = {}
        self.todo: list[list[tuple[int, list[tuple[int, int]]]]] = []
        for requests in order["requests"]:
            self.todo.append([])
            for file, clips, _ in requests:
                record = index[file]
                if file not in self.packets:
                    self.packets[file] = [av.Packet(bytes(p)) for p in reader.packets(record, 0, record.num_frames)]
                needed = [(run.first, run.stop) for run in runs(record, sorted(set(_flat(clips))))]
                self.todo[-1].append((file, needed))
        codec = index[0].codec
        context: Any = av.CodecContext.create(codec.codec, "r")
        context.thread_count = 1
        if codec.extradata:
            context.extradata = codec.extradata
        context.open()
        self.context = context

    def run(self, number: int, count: int) -> dict[str, Any]:
        """See `clipmill.tools.bench.peer.Contestant.run`."""
        context, frames = self.context, 0
        for file, needed in self.todo[number][-count:]:
            packets = self.packets[file]
            for first, stop in needed:
                context.flush_buffers()
                for place in range(first, stop):
                    frames += len(context.decode(packets[place]))
        return {"frames": frames, "first_s": 0.0, "decoded": frames}


class CopyFloor:
    """Copies the bytes that a batch of slots holds, from memory that is not in a cache, as fast as numpy can."""

    def __init__(self, order: dict[str, Any]) -> None:
        record = ShardIndex.open(order["root"])[0]
        self.frames = len(_flat(order["requests"][0][0][1]))
        size = record.height * record.width * 3 // 2 * self.frames
        self.source = np.random.default_rng(0).integers(0, 255, (BATCH, size), np.uint8)
        self.slots = np.zeros((3, BATCH, size), np.uint8)

    def run(self, number: int, count: int) -> dict[str, Any]:
        """See `clipmill.tools.bench.peer.Contestant.run`."""
        for place in range(count):
            self.slots[place // BATCH % 3, place % BATCH] = self.source[place % BATCH]
        return {"frames": count * self.frames, "first_s": 0.0}


OURS = {
    "clipmill": Clipmill,
    "clipmill RGB": Clipmill,
    "decode floor": DecodeFloor,
    "copy floor": CopyFloor,
}


def modules_of(order: dict[str, Any]) -> tuple[str, ...]:
    """Packages that an order needs."""
    basic = ("clipmill", "av", "numpy")
    return basic if order["name"].endswith("floor") else (*basic, "torch", "numba")


if __name__ == "__main__":
    serve(lambda order: OURS[order["name"]](order), modules_of)
