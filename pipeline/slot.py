"""Slots: one flat buffer per batch that holds its tables, its sound and its raw picture regions.

A batch is planned first (which records, spans and crops: `BatchPlan`), which fixes where every byte goes; decode
threads then only fill in. The same layout serves threads of this process, decode processes that share the memory,
and the device, to which the used part of the buffer travels in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipmill.pipeline.draws import Draws, fold, fold_array
from clipmill.pipeline.kernels_steps import WIDTH, room
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.spec import MATRICES, VideoSpec
from clipmill.pipeline.views import Drawn, Planner, View

ITEM = np.dtype(
    [
        ("offset", "<i8"),  # of the region's I420 bytes in the payload
        ("x", "<i4"), ("y", "<i4"), ("w", "<i4"), ("h", "<i4"),  # region in the frame, all even
        ("bx", "<f4"), ("by", "<f4"), ("bw", "<f4"), ("bh", "<f4"),  # crop box inside the region
        ("cx0", "<i4"), ("cy0", "<i4"), ("cx1", "<i4"), ("cy1", "<i4"),  # readable pixels inside the region
        ("matrix", "<i2"), ("full_range", "<i2"), ("frame", "<i4"),
    ],
    align=True,
)  # fmt: skip
SAMPLE = np.dtype([("index", "<i8"), ("uid", "<u8"), ("draw", "<u8"), ("label", "<i8")], align=True)
TARGET = ("frame", "x", "y", "w", "h", "offset")  # columns of `clipmill.pipeline.decode.targets`
_ALIGN = 64
_BLOCK = 4096  # positions of an epoch that are permuted at once


@dataclass(frozen=True, slots=True)
class Job:
    """One batch to be made: positions [start, start + count) of an epoch; ``number`` keys batch-wide draws."""

    epoch: int
    start: int
    count: int
    number: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What is equal in all batches of a loader: sizes of the tables and names of the planner's extra numbers."""

    batch_size: int
    frames: Mapping[str, int]
    samples: Mapping[str, int]
    aux: tuple[str, ...]
    steps: Mapping[str, tuple[int, int]]  # {view: (rows of each sample, steps of each row)}

    @staticmethod
    def of(planner: Planner, record: VideoRecord, batch_size: int) -> Shape:
        """Learn the shapes from the spans of one record."""
        drawn = planner(record, Draws(0), 0)
        spans = {span.view: span for span in drawn.spans}
        frames = {view.name: len(spans[view.name].frames) for view in planner.views if view.modality != "audio"}
        samples = {view.name: spans[view.name].num_samples for view in planner.views if view.modality == "audio"}
        steps = {
            view.name: (frames[view.name] if view.augment.per_frame else 1, room(view.augment.ops))
            for view in planner.views
            if isinstance(view.augment, VideoSpec)
        }
        return Shape(batch_size, frames, samples, tuple(sorted(drawn.aux)), steps)


class Slot:
    """Typed windows into one buffer. The payload of picture regions comes last and may use less than there is.

    ``flight`` says of every row whether it is waiting (0), being decoded (1) or done (2): what a decode process that
    crashed was working on.
    """

    def __init__(self, buffer: np.ndarray, shape: Shape) -> None:
        self.buffer = buffer
        self.shape = shape
        self._end = 0
        size = shape.batch_size
        self.flight = self._take(np.dtype("u1"), (size,))
        self.samples = self._take(SAMPLE, (size,))
        self.items = {name: self._take(ITEM, (size, frames)) for name, frames in shape.frames.items()}
        self.sound = {name: self._take(np.dtype("<i2"), (size, count)) for name, count in shape.samples.items()}
        self.start_s = {name: self._take(np.dtype("<f8"), (size,)) for name in (*shape.frames, *shape.samples)}
        self.aux = {name: self._take(np.dtype("<f8"), (size,)) for name in shape.aux}
        self.steps = {
            name: self._take(np.dtype("<f4"), (size * each, count, WIDTH))
            for name, (each, count) in shape.steps.items()
        }
        self.payload = buffer[self._end :]

    def used(self, payload_bytes: int) -> np.ndarray:
        """The part of the buffer that matters: the tables and a payload of that size."""
        return self.buffer[: self._end + payload_bytes]

    def _take(self, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        start = self._end
        size = int(np.prod(shape)) * kind.itemsize
        self._end = -(-(start + size) // _ALIGN) * _ALIGN
        return self.buffer[start : start + size].view(kind).reshape(shape)

    @staticmethod
    def header_bytes(shape: Shape) -> int:
        """Bytes before the payload."""
        rows = shape.batch_size
        sizes = [rows, rows * SAMPLE.itemsize]
        sizes += [rows * frames * ITEM.itemsize for frames in shape.frames.values()]
        sizes += [rows * count * 2 for count in shape.samples.values()]
        sizes += [rows * 8] * (len(shape.frames) + len(shape.samples) + len(shape.aux))
        sizes += [rows * each * count * WIDTH * 4 for each, count in shape.steps.values()]
        return sum(-(-size // _ALIGN) * _ALIGN for size in sizes)


@dataclass(slots=True)
class BatchPlan:
    """All that is decided before the first byte is read.

    items: {view: (B, T) table of `ITEM`}. targets: (B, R, 6) int64, the same regions of all views by row and frame,
    columns `TARGET`. used: different frames of each row.
    """

    records: list[VideoRecord]
    drawn: list[Drawn]
    items: dict[str, np.ndarray]
    targets: np.ndarray
    used: list[int]
    draws: np.ndarray
    payload_bytes: int


class BatchPlanner:
    """Plans batches: a pure function of (index, order, planner, seed, job, skips)."""

    def __init__(self, index: ShardIndex, planner: Planner) -> None:
        self.index = index
        self.planner = planner
        self._block: tuple[Order, int, int, np.ndarray] | None = None

    def plan(self, job: Job, order: Order, skips: Mapping[int, int]) -> BatchPlan:
        """Choose records, draw spans and crops, and lay out the payload.

        skips: {row: how many records further on to take}, for rows whose record turned out to be damaged.
        """
        numbers = order.draws(job.epoch, np.arange(job.start, job.start + job.count))
        chosen = self._records(job, order)
        for row, step in skips.items():
            if step >= len(self.index):
                raise RuntimeError(f"{self.index.root}: every record is damaged; run `clipmill verify`")
            chosen[row] = (chosen[row] + step) % len(self.index)
        records = [self.index[number] for number in chosen]
        seed = order.seed
        draws = fold_array(np.full(len(numbers), fold(seed), np.uint64), numbers)
        drawn = [
            self.planner(record, stream, number)
            for record, stream, number in zip(
                records, Draws.of(fold_array(draws, "plan")), numbers.tolist(), strict=True
            )
        ]
        heights = np.array([record.height for record in records])
        widths = np.array([record.width for record in records])
        matrices = np.array([MATRICES.index(record.codec.matrix) for record in records])
        full_range = np.array([record.codec.full_range for record in records])
        items: dict[str, np.ndarray] = {}
        end = 0
        for place, view in enumerate(self.planner.views):
            if view.modality == "audio":
                continue
            frames = np.array([one.spans[place].frames for one in drawn])
            items[view.name] = table = crop_table(view, draws, frames, heights, widths)
            table["matrix"], table["full_range"] = matrices[:, None], full_range[:, None]
            sizes = (table["w"].astype(np.int64) * table["h"] * 3 // 2).reshape(-1)
            table["offset"] = (end + np.cumsum(sizes) - sizes).reshape(table.shape)
            end += int(sizes.sum())
        targets = _targets(list(items.values()), job.count)
        new = np.diff(targets[:, :, 0], prepend=-1, axis=1) != 0
        return BatchPlan(records, drawn, items, targets, np.count_nonzero(new, 1).tolist(), draws, end)

    @staticmethod
    def batch_key(seed: int, job: Job) -> int:
        """The key of draws that a whole global batch shares."""
        return fold(seed, job.epoch, job.number, "batch")

    def _records(self, job: Job, order: Order) -> list[int]:
        """Record numbers of a job, from blocks of the epoch's order that are kept between calls."""
        chosen: list[int] = []
        position, stop = job.start, job.start + job.count
        while position < stop:
            number = position // _BLOCK
            block = self._block
            if block is None or block[0] is not order or block[1:3] != (job.epoch, number):
                positions = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, len(order)))
                block = (order, job.epoch, number, order.records(job.epoch, positions))
                self._block = block  # one assignment: other threads see the old block or the new one
            until = min(stop, (number + 1) * _BLOCK)
            chosen += block[3][position - number * _BLOCK : until - number * _BLOCK].tolist()
            position = until
        return chosen


def crop_table(
    view: View, draws: np.ndarray, frames: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """The (B, T) table of items of one view: crop boxes and the even regions that must be copied for them."""
    spec = view.augment
    assert isinstance(spec, VideoSpec)
    batch, count = frames.shape
    keys = spec.crop_keys(draws, count, view.key)
    repeat = count if spec.per_frame else 1
    height, width = np.repeat(heights, repeat), np.repeat(widths, repeat)
    boxes = spec.crop.boxes(fold_array(keys, "crop"), height, width)
    (bx, by, bw, bh), (cx0, cy0, cx1, cy1) = boxes.box.T, boxes.clamp.T
    reach_x, reach_y = spec.reach(bw), spec.reach(bh)
    x0 = np.maximum(cx0, np.floor(bx).astype(np.int64) - reach_x) & ~1
    y0 = np.maximum(cy0, np.floor(by).astype(np.int64) - reach_y) & ~1
    x1 = (np.minimum(cx1, np.ceil(bx + bw).astype(np.int64) + reach_x) + 1) & ~1
    y1 = (np.minimum(cy1, np.ceil(by + bh).astype(np.int64) + reach_y) + 1) & ~1
    table = np.zeros((batch, count), ITEM)
    columns = {
        "x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0,
        "bx": bx - x0, "by": by - y0, "bw": bw, "bh": bh,
        "cx0": np.maximum(cx0 - x0, 0), "cy0": np.maximum(cy0 - y0, 0),
        "cx1": np.minimum(cx1, x1) - x0, "cy1": np.minimum(cy1, y1) - y0,
    }  # fmt: skip
    for name, column in columns.items():
        table[name] = column.reshape(batch, -1)
    table["frame"] = frames
    return table


def _targets(tables: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(B, R, 6) int64: the regions of all views, sorted by frame within each row."""
    if not tables:
        return np.empty((count, 0, len(TARGET)), np.int64)
    whole = np.concatenate([np.stack([table[name] for name in TARGET], -1) for table in tables], 1, dtype=np.int64)
    by_frame = whole[:, :, 0].argsort(1, kind="stable")
    return np.take_along_axis(whole, by_frame[:, :, None], 1)
