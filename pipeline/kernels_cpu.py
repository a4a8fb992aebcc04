"""The augment kernel for CPUs: a few compiled passes per frame, from packed I420 to the normalised clip.

A frame stays in the cache from its first byte to its last. After the sum over columns, one pass does the sum over
rows, YUV -> RGB and all steps up to the first that must see the whole frame, sixteen pixels at a time; every such
step adds a pass, and the last writes the result. Same maths as the torch reference (`clipmill.pipeline.augment`).
Compiled once per machine by numba and cached.
"""

# Intrinsics are called without the first argument that they are written with.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.jit import compiled
from clipmill.pipeline.kernels_cpu_colour import around_mean, blur, cut, pointwise, store3
from clipmill.pipeline.kernels_cpu_resize import columns, filters, row
from clipmill.pipeline.kernels_steps import BLUR, CONTRAST, END, HUE, WIDTH
from clipmill.pipeline.simd import larger, load16, smaller, store
from clipmill.pipeline.spec import MATRICES, VideoSpec, yuv_to_rgb_matrix

_BLOCK = 16  # pixels of a row that are computed together; rows of working pictures are padded to whole blocks
_JOBS_PER_THREAD = 4  # clips differ in their steps


def augment_cpu(payload: np.ndarray, items: np.ndarray, spec: VideoSpec, steps: np.ndarray) -> Tensor:
    """(B, 3, T, size, size) float32: crop, resize, convert, and run the steps.

    payload: flat uint8. items: (B, T) table. steps: of `clipmill.pipeline.kernels_steps.lower`, B rows, or B * T.
    """
    batch, frames = items.shape
    shape = (batch, 3, frames, spec.size, spec.size)
    out = _outputs.take(math.prod(shape))
    radius = 1 if spec.interpolation == "bilinear" else 2
    longest = max(float(items["bw"].max(initial=1.0)), float(items["bh"].max(initial=1.0)))
    taps = 2 * math.ceil(radius * max(longest / spec.size, 1.0)) + 2
    most = np.array([items["h"].max(initial=2), items["w"].max(initial=2), taps])
    boxes = np.stack([items[name] for name in ("bx", "by", "bw", "bh")], -1).astype(np.float64)
    arguments = (payload, _plain(items), boxes, _colours(), steps, radius, spec.antialias, most, spec.size, out)
    threads = torch.get_num_threads()
    if threads == 1:
        _run(*arguments, 0, batch)
    else:
        bounds = np.linspace(0, batch, min(batch, _JOBS_PER_THREAD * threads) + 1).astype(int).tolist()
        jobs = [_pool(threads).submit(_run, *arguments, low, high) for low, high in pairwise(bounds)]
        for job in jobs:
            job.result()
    return torch.from_numpy(out[: math.prod(shape)].reshape(shape))


class _Outputs:
    """Memory of results that nobody holds any more: fresh pages cost about as much as filling them."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> np.ndarray:
        """At least ``count`` float32, not more than twice as many, that are in nobody else's hands."""
        with self._lock:
            idle = [a for a in self._arrays if sys.getrefcount(a) == 3]  # the list, ``a``, the call's argument
            for array in idle:
                if count <= len(array) <= 2 * count:
                    return array
            self._arrays = [a for a in self._arrays if not any(a is other for other in idle)]
            self._arrays.append(np.empty(count, np.float32))
            return self._arrays[-1]


_outputs = _Outputs()


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="clipmill-augment")


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """(2 * matrices, 12) float32: A and b of every YUV matrix, limited then full range."""
    rows = [yuv_to_rgb_matrix(name, full) for name in MATRICES for full in (False, True)]
    return np.stack([np.concatenate([mix.reshape(-1), shift]) for mix, shift in rows]).astype(np.float32)


def _plain(items: np.ndarray) -> np.ndarray:
    """(B, T, 8) int64: offset, height, width, cx0, cy0, cx1, cy1, colour row."""
    names = ("offset", "h", "w", "cx0", "cy0", "cx1", "cy1")
    columns = [items[name].astype(np.int64) for name in names]
    return np.stack([*columns, 2 * items["matrix"].astype(np.int64) + items["full_range"]], -1)


@compiled
def _run(payload, table, boxes, colours, steps, radius, antialias, most, size, out, first_clip, stop_clip):
    """Clips [first_clip, stop_clip) of a batch."""
    batch, frames = table.shape[:2]
    pitch = (size + _BLOCK - 1) // _BLOCK * _BLOCK
    per_clip = len(steps) == batch
    planes = np.zeros((3, (most[0] + most[2] + 8) * pitch), np.float32)
    turned = np.zeros(8 * (most[1] + most[2] + 8), np.float32)
    starts, weights, taps = (
        np.zeros((4, pitch), np.int64),
        np.zeros((4, pitch * most[2]), np.float32),
        np.zeros(4, np.int64),
    )
    picture, spare = np.zeros(3 * size * pitch, np.float32), np.zeros(3 * (size + 1) * pitch, np.float32)
    todo, sums = np.empty(steps.shape[1:], np.float32), np.zeros(3)
    means = np.zeros(len(todo))  # of a clip's first frame before each cutout
    for b in range(first_clip, stop_clip):
        for t in range(frames):
            item, n = table[b, t], b if per_clip else b * frames + t
            if t == 0 or not per_clip:
                for axis in range(2):
                    mirror = axis == 0 and steps[n, 0, 0] != 0.0
                    taps[axis], taps[2 + axis] = filters(
                        boxes[b, t, axis], boxes[b, t, 2 + axis], item[3 + axis], item[5 + axis], size, radius,
                        antialias, mirror, starts[axis], weights[axis], starts[2 + axis], weights[2 + axis],
                    )  # fmt: skip
            height, width, offset = item[1], item[2], item[0]
            columns(payload, offset, height, width, starts[0], weights[0], taps[0], turned, planes[0], pitch)
            height, width, offset = height // 2, width // 2, offset + height * width
            for plane in range(1, 3):
                columns(payload, offset, height, width, starts[2], weights[2], taps[2], turned, planes[plane], pitch)
                offset += height * width
            for k in range(len(todo)):
                for p in range(WIDTH):
                    todo[k, p] = steps[n, k, p]
            first, passes = np.intp(1), np.intp(0)
            while True:
                stop = first
                while stop < len(todo) and END < todo[stop, 0] <= HUE:
                    stop += 1
                barrier = todo[stop, 0] if stop < len(todo) else END
                last = barrier == END
                _pass(
                    passes == 0, planes, starts, weights, taps, colours[item[7]], picture, todo, first, stop, sums,
                    size, pitch, last, out, (b * 3 * frames + t) * size * size, frames * size * size,
                )  # fmt: skip
                if last:
                    break
                first, passes = stop + 1, passes + 1
                if barrier == CONTRAST:
                    around_mean(todo[stop], sums, size * size)
                    first = stop
                elif barrier == BLUR:
                    blur(picture, spare, todo[stop], size, pitch)
                else:
                    if t == 0 or not per_clip:
                        means[stop] = (sums[0] + sums[1] + sums[2]) / (3 * size * size)
                    cut(picture, size, pitch, todo[stop], means[stop])


@compiled
def _pass(
    from_planes, planes, starts, weights, taps, m, picture, todo, first, stop, sums,
    size, pitch, last, out, base, jump,
):  # fmt: skip
    """Steps [first, stop) of ``todo`` on a whole frame, and the sums of its channels.

    Reads the planes, whose rows are then resampled, or the picture; writes the picture or, if this is the last pass,
    channel c of pixel (i, j) to out[base + c * jump + i * size + j].
    """
    one, zero = np.float32(1.0), np.float32(0.0)
    jump_in = size * pitch
    tail = np.empty(_BLOCK, np.float32)
    inside = np.zeros(pitch, np.float32)  # 1 in the columns that are not padding
    inside[:size] = 1.0
    total_r = total_g = total_b = load16(np.zeros(_BLOCK, np.float32), 0)
    for i in range(size):
        for j in range(0, pitch, _BLOCK):
            at = i * pitch + j
            if from_planes:
                y = row(planes[0], pitch, starts[1], weights[1], taps[1], i, j)
                u = row(planes[1], pitch, starts[3], weights[3], taps[3], i, j)
                v = row(planes[2], pitch, starts[3], weights[3], taps[3], i, j)
                r = smaller(larger(m[0] * y + m[1] * u + m[2] * v + m[9], zero), one)
                g = smaller(larger(m[3] * y + m[4] * u + m[5] * v + m[10], zero), one)
                b = smaller(larger(m[6] * y + m[7] * u + m[8] * v + m[11], zero), one)
            else:
                r, g, b = load16(picture, at), load16(picture, at + jump_in), load16(picture, at + 2 * jump_in)
            for k in range(first, stop):
                r, g, b = pointwise(todo[k], r, g, b)
            total_r = total_r + load16(inside, j) * r
            total_g = total_g + load16(inside, j) * g
            total_b = total_b + load16(inside, j) * b
            if not last:
                store3(picture, at, jump_in, r, g, b)
            elif j + _BLOCK <= size:
                store3(out, base + i * size + j, jump, r, g, b)
            else:
                for c, x in enumerate((r, g, b)):
                    store(tail, 0, x)
                    for k in range(size - j):
                        out[base + c * jump + i * size + j + k] = tail[k]
    for c, x in enumerate((total_r, total_g, total_b)):
        store(tail, 0, x)
        sums[c] = 0.0
        for k in range(_BLOCK):
            sums[c] += tail[k]
