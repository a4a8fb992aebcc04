"""``clipmill pretrain --plan``: what a run would do and need, from the index alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.spec import AudioSpec, VideoSpec
from clipmill.pipeline.views import Drawn, Planner, View
from clipmill.tools.pretrain_forecast import forecast_rows
from clipmill.tools.simulate import WhatIf

if TYPE_CHECKING:
    from clipmill.models.method import Method

_RECORDS = 256  # sampled for the averages
_STATE = {"sgd": 1, "lars": 1, "adam": 2, "adamw": 2, "larc_adam": 2}  # copies of the weights an optimiser keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Averages over sampled records. read: bytes from the shards per sample. decoded, used: frames per sample."""

    read: float
    decoded: float
    used: float


def plan_lines(
    method: Method, index: ShardIndex, train: TrainConfig, loader: LoaderConfig, what_if: WhatIf
) -> list[str]:
    """The plan as text; raises ValueError where the run itself would. ``method`` takes a few steps on the way."""
    planner = method.plan()
    usable = planner.usable(index)
    records = int(usable.sum())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if train.batch_size % (world * train.accumulate):
        raise ValueError(
            f"batch_size = {train.batch_size} cannot be cut into {world} processes x {train.accumulate} parts"
        )
    per_epoch = records * train.repeat // train.batch_size
    if not per_epoch:
        raise ValueError(
            f"{index.root}: {records * train.repeat} samples an epoch do not fill one batch of {train.batch_size}; "
            "use a smaller batch_size"
        )
    wanted = index.select(usable)
    cost = sample_cost(wanted, planner, train.seed)
    part = train.batch_size // (world * train.accumulate)
    params = list(method.parameters())
    trainable = sum(param.numel() * param.element_size() for param in params if param.requires_grad)
    others = sum(tensor.numel() * tensor.element_size() for tensor in method.buffers())
    others += sum(param.numel() * param.element_size() for param in params if not param.requires_grad)
    copies = 2 + _STATE[train.optimiser]
    inputs = part * sum(view_numbers(view) * 4 for view in planner.views)
    samples = per_epoch * train.batch_size
    rows = [
        ("records", f"{records} usable of {len(index)}, {train.repeat} visits per epoch"),
        ("steps", f"{per_epoch} per epoch x {train.epochs} epochs = {per_epoch * train.epochs}"),
        ("batch", f"{train.batch_size} samples: {world} processes x {train.accumulate} parts x {part}"),
        *((f"view {view.name}", _view_text(view)) for view in planner.views),
        ("per sample", f"{_size(cost.read)} read, {cost.decoded:.1f} frames decoded for {cost.used:.1f} used"),
        ("per epoch", f"{samples} samples, {_size(cost.read * samples)} read"),
        ("whole run", f"{samples * train.epochs} samples, {_size(cost.read * samples * train.epochs)} read"),
        ("weights", f"{sum(p.numel() for p in params) / 1e6:.2f} M, {trainable / 4e6:.2f} M of them trained"),
        ("memory", f"{_size(trainable * copies + others)} weights, gradients and {train.optimiser} state"),
        ("", f"{_size(inputs)} input per part; activations come on top"),
    ]
    if world == 1:
        needs = {"part": part, "read_bytes": cost.read, "input_bytes": inputs}
        rows += forecast_rows(method, wanted, train, loader, what_if, **needs)
    return [f"{name:<13} {text}" for name, text in rows]


def sample_cost(index: ShardIndex, planner: Planner, seed: int) -> Cost:
    """Average bytes and frames per sample, over at most 256 records spread over the index."""
    numbers = np.unique(np.linspace(0, len(index) - 1, min(_RECORDS, len(index))).astype(np.int64))
    rows = [
        record_cost(record, planner(record, Draws(seed, number, "plan"), number))
        for number in numbers.tolist()
        for record in (index[number],)
    ]
    read, decoded, used = np.mean(rows, 0).tolist()
    return Cost(read=read, decoded=decoded, used=used)


def record_cost(record: VideoRecord, drawn: Drawn) -> tuple[int, int, int]:
    """(bytes, frames decoded, frames used) of one sample: every group of pictures up to its last wanted frame."""
    read = 2 * sum(span.num_samples for span in drawn.spans)
    frames = sorted({frame for span in drawn.spans for frame in span.frames})
    decoded = 0
    place = np.argsort(record.presentation, kind="stable") if len(record.presentation) else None
    packets = np.array(frames, np.int64) if place is None else place[np.array(frames, np.int64)]
    group = np.searchsorted(record.keyframes, packets, "right") - 1
    for number in np.unique(group).tolist():
        first, last = int(record.keyframes[number]), int(packets[group == number].max())
        decoded += last + 1 - first
        read += int(record.packet_sizes[first : last + 1].sum(dtype=np.int64))
    return read, decoded, len(frames)


def view_numbers(view: View) -> int:
    """Numbers in one sample of a view, as the method gets it."""
    spec = view.augment
    if isinstance(spec, VideoSpec):
        return 3 * view.num_frames * spec.size * spec.size
    assert isinstance(spec, AudioSpec)
    samples = round(view.duration_s * spec.hz)
    return samples if spec.logmel is None else spec.logmel.mels * spec.logmel.frames(samples)


def _view_text(view: View) -> str:
    spec = view.augment
    if isinstance(spec, VideoSpec):
        rate = f"stride {view.stride}" if view.fps is None else f"{view.fps:g} frames/s"
        return f"{view.num_frames} x {spec.size} x {spec.size}, {rate}"
    kind = "waveform" if spec.logmel is None else f"log-mel, {spec.logmel.mels} bands"
    return f"{view.duration_s:g} s at {spec.hz} Hz, {kind}"


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(999), _size(2048), _size(3.5e9)
    ('999 B', '2.0 KiB', '3.3 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
