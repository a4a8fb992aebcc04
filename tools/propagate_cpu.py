"""The best source cells of every target cell, compiled for CPUs.

The window of a target cell is walked row by row. Four neighbouring target cells meet four neighbouring source cells at
a time, which keeps sixteen running sums in registers; of their products only the best per target cell are kept, so
nothing is stored besides the result. Compiled once per machine by numba and cached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.jit import compiled

BLOCK = 4
_PARTS = 4  # pieces of a frame per thread


def best_cells(
    target_HWC: Tensor,
    bank_SHWC: Tensor,
    entries: Sequence[tuple[int, bool]],
    tables: Mapping[bool, Sequence[int]],
    topk: int,
    gain: float,
    keep_ties: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best source cells of all target cells over all entries: weights (N, k), cells (N, k), ties (N,).

    target, bank: float32 features, at least `BLOCK` cells wide; the bank may be half precision. entries: (stored
    frame, whether it has no window), repetitions count. tables: the windows, see
    `clipmill.tools.propagate.half_widths`. gain: factor before the softmax. Cells are numbered through all stored
    frames. With ``keep_ties``, ties is true where more cells than these are as good as the last one.
    """
    height, width, _ = target_HWC.shape
    cells = height * width
    keep = topk + keep_ties
    value = np.full((cells, keep), -np.inf, np.float32)
    index = np.zeros((cells, keep), np.int64)
    copies = Counter(entries)
    target = target_HWC.contiguous().numpy()
    threads = torch.get_num_threads()
    bounds = np.linspace(0, height, min(threads * _PARTS, height) + 1).astype(int).tolist()
    for number, (slot, unbound) in enumerate(copies):
        source = bank_SHWC[slot].float().contiguous().numpy()
        table = np.array(tables[unbound], np.int64)
        arguments = (target, source, table, number * cells, value, index)
        for job in [_pool(threads).submit(_scan, *arguments, low, high) for low, high in pairwise(bounds)]:
            job.result()
    score, found = torch.from_numpy(value), torch.from_numpy(index)
    entry, cell = found // cells, found % cells
    count = torch.tensor(list(copies.values()))[entry]
    before = count.cumsum(1) - count
    tied = torch.zeros(cells, dtype=torch.bool)
    if keep_ties:
        tied = (score[:, -1] == score[:, -2]) & score[:, -1].isfinite()
    taken = (topk - before).clamp_(min=0).minimum(count)
    power = taken * torch.exp((score - score[:, :1]) * gain)
    place = torch.tensor([slot for slot, _ in copies])[entry] * cells + cell
    return power / power.sum(1, keepdim=True), place, tied


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "propagate")


@compiled
def _scan(target, source, table, first, value, index, low, high):
    """Offer the cells of one source frame to the target cells of rows low to high; cell 0 is number ``first``."""
    height, width, _ = source.shape
    dots = np.empty((BLOCK, BLOCK), np.float32)
    for y in range(low, high):
        for x in range(0, width, BLOCK):
            left = min(x, width - BLOCK)  # the last block overlaps the one before
            for row in range(height):
                reach = table[row - y + height - 1]
                if reach < 0:
                    continue
                stop = min(left + BLOCK - 1 + reach, width - 1) + 1
                for column in range(max(x - reach, 0), stop, BLOCK):
                    start = min(column, width - BLOCK)
                    _products(target[y, left : left + BLOCK], source[row, start : start + BLOCK], dots)
                    for i in range(x - left, BLOCK):
                        cell = y * width + left + i
                        for j in range(column - start, BLOCK):
                            if dots[i, j] > value[cell, -1] and abs(start + j - left - i) <= reach:
                                _insert(value[cell], index[cell], dots[i, j], first + row * width + start + j)


@compiled
def _insert(values, indices, value, index):
    """Put one into a list in descending order, whose last drops out; equals come in the order of their arrival."""
    place = len(values) - 1
    while place > 0 and values[place - 1] < value:
        values[place], indices[place] = values[place - 1], indices[place - 1]
        place -= 1
    values[place], indices[place] = value, index


@compiled
def _products(a, b, out):
    """out[i, j] = <a[i], b[j]> of four rows each, with all sums in registers."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0], b[1], b[2], b[3]
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = np.float32(0)
    for c in range(a.shape[1]):
        p0, p1, p2, p3 = a0[c], a1[c], a2[c], a3[c]
        q = b0[c]
        s00 += p0 * q
        s10 += p1 * q
        s20 += p2 * q
        s30 += p3 * q
        q = b1[c]
        s01 += p0 * q
        s11 += p1 * q
        s21 += p2 * q
        s31 += p3 * q
        q = b2[c]
        s02 += p0 * q
        s12 += p1 * q
        s22 += p2 * q
        s32 += p3 * q
        q = b3[c]
        s03 += p0 * q
        s13 += p1 * q
        s23 += p2 * q
        s33 += p3 * q
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = s00, s01, s02, s03
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = s10, s11, s12, s13
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = s20, s21, s22, s23
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = s30, s31, s32, s33
