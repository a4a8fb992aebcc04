"""Label propagation: soft labels of the first frame travel to every later one along feature affinities.

One core for the published variants (`Rule`): VFS (Xu, Wang, arXiv 2103.17263), CRW (Jabri, Owens, Efros, arXiv
2006.14613), DINO (Caron et al., arXiv 2104.14294), UVC (Li et al., arXiv 1909.11895) and ContrastCorr (Wang, Zhou, Li,
arXiv 2012.05057). For a target cell only the source cells in its window are looked at; the affinity of two whole
frames is never held. On a CPU the usual variants run in a compiled kernel (`clipmill.tools.propagate_cpu`), everything
else, and every GPU, in tiles of target cells.

Shapes: C feature channels, K label channels, h x w cells of the feature grid, N = h * w, S stored frames.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.tools import propagate_cpu

T = TypeVar("T")
Box = tuple[slice, slice]
_MUTUAL_EPS = 1e-5
TILE, WIDE_TILE = {"cpu": 8}, 16  # side in cells; wide where a launch costs more than arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Where a cell's label comes from. Raises ValueError for values that do not fit together."""

    context: int = 20
    """Previous frames that are sources, besides the first."""
    topk: int = 10
    """Source cells that count."""
    tau: float = 0.07
    """Temperature of the softmax."""
    multiply: bool = False
    """Multiply the affinity by tau instead of dividing."""
    window: Literal["disc", "square", "none"] = "disc"
    """Allowed source cells: Euclidean distance < radius; both offsets <= radius; all."""
    radius: int = 12
    """Of the window, in cells."""
    first: Literal["repeat", "pad", "once"] = "repeat"
    """Frame 0 comes first; the context then starts at frame 0 (repeat), is filled up with frame 0 (pad), or starts at
    frame 1 (once)."""
    free_first: bool = False
    """No window on that first entry."""
    joint: bool = True
    """Select and normalise over all source frames together; otherwise per frame, and average the frames."""
    ties: Literal["cut", "keep"] = "cut"
    """Exactly topk cells, or all that are as good as the last of them."""
    renormalise: bool = True
    """Weights of the selected cells sum to 1; otherwise they keep their share of all allowed cells."""
    mutual: bool = False
    """Scale every affinity by its share of the best of its source cell and of its target cell."""
    unit: bool = True
    """L2-normalise the features."""

    def __post_init__(self) -> None:
        for name in ("context", "topk", "radius"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.mutual and (self.window != "none" or self.joint):
            raise ValueError("mutual matching is defined between whole frames; use window none without joint")

    @property
    def gain(self) -> float:
        """What affinities are multiplied by before the softmax."""
        return self.tau if self.multiply else 1 / self.tau


def source_frames(t: int, rule: Rule) -> list[int]:
    """Frames whose labels go to frame t, with repetitions; the first entry is frame 0.

    >>> [source_frames(2, Rule(context=3, first=first)) for first in ("repeat", "pad", "once")]
    [[0, 0, 1], [0, 0, 0, 1], [0, 1]]
    """
    first = {"repeat": max(t - rule.context, 0), "pad": t - rule.context, "once": max(t - rule.context, 1)}
    return [0, *(max(s, 0) for s in range(first[rule.first], t))]


def half_widths(rule: Rule, height: int, width: int, free: bool = False) -> list[int]:
    """The window by rows: at row offset dy, columns up to ``[dy + height - 1]`` away are allowed; -1 = none.

    >>> half_widths(Rule(radius=3), 5, 9)
    [-1, -1, 2, 2, 2, 2, 2, -1, -1]
    """
    offsets = range(1 - height, height)
    if free or rule.window == "none":
        return [width for _ in offsets]
    if rule.window == "square":
        return [rule.radius if abs(dy) <= rule.radius else -1 for dy in offsets]
    return [math.isqrt(rest - 1) if (rest := rule.radius**2 - dy * dy) > 0 else -1 for dy in offsets]


@dataclass(slots=True, kw_only=True)
class Seconds:
    """Wall time by stage, added up."""

    features: float = 0.0
    affinity: float = 0.0
    labels: float = 0.0

    def add(self, stage: str, since: float) -> None:
        """Add the time since ``since`` (of `time.perf_counter`) to a stage."""
        setattr(self, stage, getattr(self, stage) + time.perf_counter() - since)


@torch.no_grad()
def propagate(
    features: Iterable[Tensor],
    first: Tensor,
    rule: Rule,
    *,
    store: torch.dtype | None = None,
    seconds: Seconds | None = None,
) -> Iterator[Tensor]:
    """Soft labels (K, h, w) of frames 1, 2, ..., each as soon as its features are there.

    features: (C, h, w) per frame from frame 0 on, float32 or float64, on one device. first: (K, h, w), labels of
    frame 0. store: precision of kept features, e.g. bfloat16; products and sums stay as precise as ``features``.
    seconds: collects times by stage; on a GPU this waits for each stage. Holds context + 1 frames of features and
    labels and the scratch memory of one step (`memory_bytes`).
    """
    bank: _Bank | None = None
    for t, raw in enumerate(_timed(features, "features", seconds)):
        if raw.shape[1:] != first.shape[1:]:
            raise ValueError(f"features of frame {t} are {tuple(raw.shape[1:])} cells, labels {tuple(first.shape[1:])}")
        x = (F.normalize(raw, dim=0) if rule.unit else raw).movedim(0, -1).contiguous()
        del raw  # a frame's features are large; nothing is kept twice
        if bank is None:
            bank = _Bank(x, first, rule, store or x.dtype)
            bank.keep(0, x, first.to(x.device, x.dtype).movedim(0, -1))
            continue
        if x.dtype != bank.features.dtype:
            x = x.to(bank.features.dtype).to(x.dtype)
        sources = [bank.slot(s) for s in source_frames(t, rule)]
        soft = attend(x, bank.features, bank.labels, sources, rule, free=int(rule.free_first), seconds=seconds)
        bank.keep(t, x, soft)
        yield soft.movedim(-1, 0)


class _Bank:
    """Features (S, h, w, C) and labels (S, h, w, K) of frame 0 and the last frames, S = context + 1."""

    def __init__(self, x_HWC: Tensor, first_KHW: Tensor, rule: Rule, store: torch.dtype) -> None:
        self.context = rule.context
        slots = rule.context + 1
        self.features = torch.empty((slots, *x_HWC.shape), dtype=store, device=x_HWC.device)
        shape = (slots, *first_KHW.shape[1:], first_KHW.shape[0])
        self.labels = torch.empty(shape, dtype=x_HWC.dtype, device=x_HWC.device)

    def slot(self, t: int) -> int:
        return 0 if t == 0 else 1 + (t - 1) % self.context

    def keep(self, t: int, x_HWC: Tensor, soft_HWK: Tensor) -> None:
        self.features[self.slot(t)] = x_HWC
        self.labels[self.slot(t)] = soft_HWK


@torch.no_grad()
def attend(
    target_HWC: Tensor,
    bank_SHWC: Tensor,
    labels_SHWK: Tensor,
    sources: Sequence[int],
    rule: Rule,
    *,
    free: int = 0,
    seconds: Seconds | None = None,
) -> Tensor:
    """Labels (h, w, K) of one frame from stored frames: one step of the propagation.

    sources: numbers of stored frames, repetitions count. free: how many of them, from the front, have no window.
    Features are used as they are, without normalisation.
    """
    height, width, _ = target_HWC.shape
    entries = [(slot, number < free) for number, slot in enumerate(sources)]
    out = torch.empty((height, width, labels_SHWK.shape[-1]), dtype=labels_SHWK.dtype, device=target_HWC.device)
    side = TILE.get(target_HWC.device.type, WIDE_TILE)
    boxes = [
        (slice(y, min(y + side, height)), slice(x, min(x + side, width)))
        for y, x in product(range(0, height, side), range(0, width, side))
    ]
    if _compiled(target_HWC, rule, entries):
        since = time.perf_counter()
        tables = {unbound: half_widths(rule, height, width, unbound) for unbound in (False, True)}
        weight, index, tied = propagate_cpu.best_cells(
            target_HWC, bank_SHWC, entries, tables, rule.topk, rule.gain, rule.ties == "keep"
        )
        since = _lap(seconds, "affinity", since, out)
        out.view(-1, out.shape[-1])[:] = torch.einsum("nk,nkc->nc", weight, labels_SHWK.flatten(0, 2)[index])
        _lap(seconds, "labels", since, out)
        boxes = [box for box in boxes if tied.view(height, width)[box].any()]
    windows = {unbound: _Window(rule, height, width, unbound, out.device) for unbound in (False, True)}
    peaks = _peaks(target_HWC, bank_SHWC, sources, boxes) if rule.mutual else {}
    groups = [entries] if rule.joint else [[entry] for entry in entries]
    for box in boxes:
        parts = []
        for group in groups:
            since = time.perf_counter()
            weight, places = _tile_weights(target_HWC, bank_SHWC, group, box, rule, windows, peaks)
            since = _lap(seconds, "affinity", since, out)
            parts.append(weight.to(out.dtype) @ torch.cat([_cells(labels_SHWK, *place) for place in places]))
            _lap(seconds, "labels", since, out)
        mean = torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]
        out[box] = mean.view(out[box].shape)
    return out


def _compiled(target_HWC: Tensor, rule: Rule, entries: Sequence[tuple[int, bool]]) -> bool:
    """Whether the compiled kernel can do this step; of repeated entries it cannot keep all ties."""
    single = rule.ties == "cut" or len(set(entries)) == len(entries)
    wide = target_HWC.shape[1] >= propagate_cpu.BLOCK
    return _usual(rule) and single and wide and target_HWC.is_cpu and target_HWC.dtype == torch.float32


def _usual(rule: Rule) -> bool:
    """Whether the compiled kernel knows this way of weighing."""
    return rule.joint and rule.renormalise and not rule.mutual


# --- tiles --------------------------------------------------------------------------------------------------


class _Window:
    """The allowed source cells around a target cell; ``table`` is that of `half_widths`, down and across its reach."""

    def __init__(self, rule: Rule, height: int, width: int, unbound: bool, device: torch.device) -> None:
        table = half_widths(rule, height, width, unbound)
        self.table = torch.tensor(table, device=device)
        self.down, self.across = sum(half >= 0 for half in table) // 2, max(table)
        self.all = unbound or rule.window == "none"

    def region(self, box: Box, height: int, width: int) -> Box:
        """The rows and columns that any cell of a tile may look at."""
        return _grown(box[0], self.down, height), _grown(box[1], self.across, width)

    def allowed(self, box: Box, region: Box) -> Tensor:
        """(n, U) bool: which cells of a region each cell of a tile may look at."""
        dy, dx = (
            torch.arange(far.start, far.stop, device=self.table.device)
            - torch.arange(near.start, near.stop, device=self.table.device)[:, None]
            for near, far in zip(box, region, strict=True)
        )
        half = self.table[dy + len(self.table) // 2]
        return (dx.abs()[None, :, None, :] <= half[:, None, :, None]).flatten(2).flatten(0, 1)


def _grown(part: slice, by: int, size: int) -> slice:
    return slice(max(part.start - by, 0), min(part.stop + by, size))


def _tile_weights(
    target: Tensor,
    bank: Tensor,
    entries: Sequence[tuple[int, bool]],
    box: Box,
    rule: Rule,
    windows: dict[bool, _Window],
    peaks: dict[int, Tensor],
) -> tuple[Tensor, list[tuple[list[int], Box]]]:
    """Weights (n, M) of a tile's n target cells, and the (stored frames, region) its M source cells are, in order."""
    query = target[box].flatten(0, 1)
    scores, places = [], []
    for unbound in (True, False):
        slots = [slot for slot, free in entries if free == unbound]
        if not slots:
            continue
        region = windows[unbound].region(box, target.shape[0], target.shape[1])
        once = list(dict.fromkeys(slots))  # a frame's copies have the very same scores
        score = (query @ _cells(bank, once, region).to(query.dtype).T).view(len(query), len(once), -1)
        if len(once) < len(slots):
            score = score[:, [once.index(slot) for slot in slots]]
        if not windows[unbound].all:
            score.masked_fill_(~windows[unbound].allowed(box, region)[:, None], -torch.inf)
        scores.append(score.flatten(1))
        places.append((slots, region))
    score = torch.cat(scores, 1) if len(scores) > 1 else scores[0]
    if rule.mutual:
        score = mutual_matching(score, score.amax(1, keepdim=True), peaks[entries[0][0]])
    score *= rule.gain
    best = score.topk(min(rule.topk, score.shape[1]), 1)
    if rule.ties == "keep":
        dropped = score < best.values[:, -1:]
    else:
        dropped = torch.ones_like(score, dtype=torch.bool).scatter_(1, best.indices, False)
    if rule.renormalise:
        return score.masked_fill_(dropped, -torch.inf).softmax(1), places
    return score.softmax(1).masked_fill_(dropped, 0), places


def mutual_matching(affinity: Tensor, best_of_target: Tensor, best_of_source: Tensor) -> Tensor:
    """Affinities scaled by their share of the best of their target cell and of their source cell (ContrastCorr)."""
    return affinity * (affinity / (best_of_target + _MUTUAL_EPS)) * (affinity / (best_of_source + _MUTUAL_EPS))


def _peaks(target: Tensor, bank: Tensor, sources: Sequence[int], boxes: Sequence[Box]) -> dict[int, Tensor]:
    """For each stored frame the best affinity of every cell with any target cell, (N,)."""
    peaks = {}
    for slot in set(sources):
        cells = bank[slot].flatten(0, 1).to(target.dtype).T
        parts = [(target[box].flatten(0, 1) @ cells).amax(0) for box in boxes]
        peaks[slot] = torch.stack(parts).amax(0)
    return peaks


def _cells(x_SHWC: Tensor, slots: Sequence[int], region: Box) -> Tensor:
    """A region of some stored frames as rows (len(slots) * cells, C)."""
    chosen = torch.tensor(slots, device=x_SHWC.device)
    return x_SHWC[:, region[0], region[1]].index_select(0, chosen).flatten(0, 2)


# --- time and memory ----------------------------------------------------------------------------------------


def _timed(items: Iterable[T], stage: str, seconds: Seconds | None) -> Iterator[T]:
    iterator = iter(items)
    while True:
        since = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        if seconds is not None:
            seconds.add(stage, since)
        yield item
        del item


def _lap(seconds: Seconds | None, stage: str, since: float, device_of: Tensor) -> float:
    """Add the time since ``since`` to a stage, once the device is done with it; returns the time now."""
    if seconds is None:
        return since
    if device_of.is_cuda:
        torch.cuda.synchronize(device_of.device)
    seconds.add(stage, since)
    return time.perf_counter()


def memory_bytes(
    height: int, width: int, channels: int, labels: int, rule: Rule, *, store_bytes: int = 4, device: str = "cpu"
) -> dict[str, int]:
    """The most that `propagate` holds for an h x w grid: ``features``, ``labels``, and ``step`` on top for one frame.

    labels: K. store_bytes: of a stored feature's number. Exact for what is kept; for a step it is an upper bound.
    The whole affinity, which is never built, would be ``affinity``.
    """
    cells, slots = height * width, rule.context + 1
    side = TILE.get(device, WIDE_TILE)
    table = half_widths(rule, height, width)
    rows = min(side + 2 * (sum(half >= 0 for half in table) // 2), height)
    columns = min(side + 2 * max(table), width)
    together = slots if rule.joint else 1
    candidates = (together - 1) * rows * columns + (cells if rule.free_first else rows * columns)
    tile = 4 * candidates * (8 * side * side + 2 * channels + 2 * labels)
    frame = 4 * cells * (4 * channels + 3 * labels)
    compiled = cells * (rule.topk + 1) * (40 + 8 * labels)
    only_compiled = device == "cpu" and _usual(rule) and rule.ties == "cut" and width >= propagate_cpu.BLOCK
    scratch = compiled if only_compiled else max(tile, compiled)
    peaks = 8 * slots * cells if rule.mutual else 0
    return {
        "features": slots * cells * channels * store_bytes,
        "labels": 4 * slots * cells * labels,
        "step": frame + peaks + scratch,
        "affinity": 4 * slots * cells * cells,
    }
