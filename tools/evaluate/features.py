"""What a frozen network says about every record of a packed data set: features or class scores, each record once.

Records pass through the loader in index order with nothing drawn, so the outcome does not depend on batch size,
threads or where an interrupted pass was resumed. Finished parts lie in a cache folder named by what they depend on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.views import Planner
from clipmill.tools.evaluate.evaluator import Progress, silent, write_atomic
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.views import EvalPlan
from clipmill.tools.metrics import unit_rows

Precision = Literal["fp32", "bf16", "fp16"]
_VERSION = 1  # of the cached files; a new number makes old ones unknown
_FLUSH_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How the network is run; apart from precision, none of it decides the numbers."""

    batch_size: int = 32
    """Inputs per forward pass."""
    threads: int = 0
    """Decode threads, 0 = choose."""
    processes: int = -1
    """Decode processes, 0 = none, -1 = choose."""
    decoder: str = "pyav"
    """Decoder backend."""
    shard_cache_gb: float = 0.0
    """GiB of local disk for what is read of shards at a URL."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    precision: Precision = "fp32"
    """Precision of the network; fp16 and bf16 run under autocast."""
    cache: Path | None = None
    """Folder for features; default: `features` in the output folder."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def torch_device(self) -> torch.device:
        """The device meant by ``device``."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {name!r} is not available on this machine; use --device cpu")
        return device

    @property
    def loader(self) -> LoaderConfig:
        """The loader's part."""
        return LoaderConfig(
            threads=self.threads,
            processes=self.processes,
            decoder=self.decoder,
            shard_cache_gb=self.shard_cache_gb,
        )

    def autocast(self) -> torch.autocast:
        """The context a forward pass runs in."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.torch_device.type, dtype, enabled=self.precision != "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Row i belongs to record i of the index that was read.

    feature: (N, V, D) float32; V = 1 when views were averaged. label: (N,) int64. uid: (N,) uint64.
    """

    feature: np.ndarray
    label: np.ndarray
    uid: np.ndarray

    def __len__(self) -> int:
        return len(self.uid)

    def of(self, index: ShardIndex) -> Features:
        """The rows of the records of ``index``, a part of the one that was read."""
        order = np.argsort(self.uid, kind="stable")
        rows = order[np.searchsorted(self.uid, index.column("uid").astype(np.uint64), sorter=order)]
        return Features(feature=self.feature[rows], label=self.label[rows], uid=self.uid[rows])

    @property
    def mean(self) -> np.ndarray:
        """(N, D), averaged over views."""
        return self.feature.mean(1)

    @property
    def moments(self) -> np.ndarray:
        """(N, 2 D), mean and standard deviation over views: what changes in time, seen through single frames."""
        return np.concatenate([self.feature.mean(1), self.feature.std(1)], 1)

    def pooled(self, unit_views: bool) -> np.ndarray:
        """(N, D), averaged over views; ``unit_views`` scales every view to length 1 before."""
        return unit_rows(self.feature).mean(1) if unit_views else self.mean


def stack_views(batch: ClipBatch, plan: EvalPlan) -> Tensor:
    """The inputs of a batch, (B, V, ...), clip by clip: (B, V, C, T, H, W) or (B, V, 1, mels, frames)."""
    if plan.modality == "audio":
        return torch.stack([batch.audio[view.name] for view in plan.planner.views], 1)
    crops = []
    for view in plan.planner.views:
        x = batch.video[view.name]
        crops.append(x.unflatten(2, (plan.clips, view.num_frames)).transpose(1, 2))
    return torch.stack(crops, 2).flatten(1, 2)


@torch.no_grad()
def forward_views(model: nn.Module, batch: ClipBatch, plan: EvalPlan, compute: Compute) -> Tensor:
    """The network's answer to every view of a batch, (B, V, D) float32; ``model`` should be in eval mode."""
    x = stack_views(batch, plan)
    with compute.autocast():
        answers = [model(part).float() for part in x.flatten(0, 1).split(compute.batch_size)]
    return torch.cat(answers).unflatten(0, x.shape[:2])


def records_at_once(plan: EvalPlan, compute: Compute) -> int:
    """Records per loader batch, such that their views fill one forward pass."""
    return max(1, compute.batch_size // plan.num_views)


def extract(
    model: nn.Module,
    index: ShardIndex,
    plan: EvalPlan,
    compute: Compute,
    *,
    keep_views: bool = False,
    cache: Path | None = None,
    what: str = "features",
    progress: Progress = silent,
    flush_s: float = _FLUSH_S,
) -> Features:
    """Run ``model`` in eval mode over all records of ``index``.

    keep_views: keep the answers of all views instead of their average; not with clips that overlap, of which records
    have different numbers. cache: folder in which finished parts are kept every ``flush_s`` seconds and looked for
    first; None keeps nothing. Raises ValueError, naming the record, for one that the plan cannot serve, that is
    damaged, or whose features are not finite. The model is moved to the device of ``compute``; its training mode is
    restored.
    """
    if keep_views and plan.overlap:
        raise ValueError(
            "spacing = overlap makes a different number of clips of each record, whose features can only be averaged; "
            "choose --average features, leave --unit-clips out, or use another --spacing"
        )
    require_usable(index, plan.planner)
    model.to(compute.torch_device)
    store = _Store(None, "") if cache is None else _Store(cache, cache_key(model, index, plan, compute, keep_views))
    parts = store.load(index)
    done = sum(len(part) for part in parts)
    progress(what, done, len(index), "records")
    fresh: list[np.ndarray] = []
    flushed, last_s = done, time.monotonic()
    was_training = model.training
    model.eval()
    try:
        for rows in _rows(model, index, plan, compute, keep_views, done) if done < len(index) else ():
            fresh.append(rows)
            done += len(rows)
            progress(what, done, len(index), "records")
            if time.monotonic() - last_s >= flush_s or done == len(index):
                parts.append(np.concatenate(fresh))
                store.save(flushed, parts[-1], index)
                fresh, flushed, last_s = [], done, time.monotonic()
    finally:
        model.train(was_training)
    label = index.column("label").astype(np.int64)
    return Features(feature=np.concatenate(parts), label=label, uid=index.column("uid").astype(np.uint64))


def require_usable(index: ShardIndex, planner: Planner) -> None:
    """Raise ValueError naming the first record that has no picture or no sound, where the planner needs it."""
    missing = np.flatnonzero(~planner.usable(index))
    if len(missing):
        lacks = "sound" if all(view.modality == "audio" for view in planner.views) else "pictures"
        raise ValueError(
            f"{index.root}: {len(missing)} of {len(index)} records have no {lacks}, the first is "
            f"{index[int(missing[0])].key!r}; this encoder needs it: evaluate on a corpus where all records have it"
        )


def _rows(
    model: nn.Module, index: ShardIndex, plan: EvalPlan, compute: Compute, keep_views: bool, start: int
) -> Iterator[np.ndarray]:
    """(B, V or 1, D) blocks of records, from record ``start`` on."""
    planner, record = plan.visits(index)
    visit = int(np.searchsorted(record, start))
    loader = Loader(
        index,
        planner,
        batch_size=records_at_once(plan, compute),
        shuffle=False,
        drop_last=False,
        picks=record,
        device=compute.torch_device,
        config=compute.loader,
    )
    pending = np.zeros(0)
    with loader:
        for batch in loader.epoch(0, visit):
            numbers = record[visit : visit + len(batch)]
            require_order(loader, batch.index.cpu().numpy(), numbers)
            answers = forward_views(model, batch, plan, compute)
            if not keep_views:
                answers = answers.mean(1, keepdim=True)
            rows = answers.cpu().numpy()
            bad = ~np.isfinite(rows).all((1, 2))
            if bad.any():
                key = index[int(numbers[bad.argmax()])].key
                raise ValueError(f"the encoder's features of record {key!r} are not finite; it may have diverged")
            visit += len(rows)
            if plan.overlap:
                rows = np.concatenate([pending, rows]) if len(pending) else rows
                numbers = record[visit - len(rows) : visit]
                whole = len(rows) if visit == len(record) else int(np.searchsorted(numbers, record[visit]))
                pending, rows = rows[whole:], _averages(rows[:whole], numbers[:whole])
            if len(rows):
                yield rows


def _averages(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(records, 1, D), the averages of the rows (visits, 1, D) of each record."""
    if not len(rows):
        return rows
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    count = np.diff(np.append(first, len(rows)))
    return (np.add.reduceat(rows, first) / count[:, None, None]).astype(rows.dtype)


def require_order(loader: Loader, numbers: np.ndarray, wanted: np.ndarray) -> None:
    """Raise ValueError if the loader put another record in the place of a damaged one: a score would be wrong."""
    wrong = np.flatnonzero(numbers != wanted)
    if len(wrong):
        number = int(wanted[wrong[0]])
        raise ValueError(
            f"{loader.index.root}: record {loader.index[number].key!r} is damaged "
            f"({loader.damaged.get(number, 'unreadable')}); run `clipmill verify` and pack it again"
        )


# --- cache --------------------------------------------------------------------------------------------------


def cache_key(model: nn.Module, index: ShardIndex, plan: EvalPlan, compute: Compute, keep_views: bool) -> str:
    """A hex name of everything that features depend on."""
    facts = (_VERSION, encoder_digest(model), index.digest, repr(plan), compute.precision, compute.decoder, keep_views)
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


class _Store:
    """Parts of one pass: files ``KEY/START.safetensors`` that follow each other without a gap."""

    def __init__(self, cache: Path | None, key: str) -> None:
        self._folder = None if cache is None else cache / key

    def load(self, index: ShardIndex) -> list[np.ndarray]:
        """All leading parts that are whole and belong to the records of ``index``."""
        parts: list[np.ndarray] = []
        uid = index.column("uid")
        start = 0
        while self._folder is not None and start < len(uid):
            try:
                part = safetensors.numpy.load_file(self._path(self._folder, start))
            except (OSError, SafetensorError):  # not there, or cut off by a dying machine: compute it again
                break
            if not np.array_equal(part["uid"], uid[start : start + len(part["uid"])]) or len(part["uid"]) == 0:
                break
            parts.append(part["feature"])
            start += len(part["uid"])
        return parts

    def save(self, start: int, feature: np.ndarray, index: ShardIndex) -> None:
        if self._folder is not None:
            uid = index.column("uid")[start : start + len(feature)]
            tensors = {"feature": np.ascontiguousarray(feature), "uid": np.array(uid, np.uint64)}
            write_atomic(self._path(self._folder, start), safetensors.numpy.save(tensors))

    @staticmethod
    def _path(folder: Path, start: int) -> Path:
        return folder / f"{start:010d}.safetensors"
