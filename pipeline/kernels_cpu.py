"""The augment kernel for CPUs: one compiled pass per frame from packed I420 to the normalised clip.

Same maths as the torch reference (`clipmill.pipeline.augment`), frame by frame while it is in the cache: separable
resize of the three planes, YUV -> RGB, then the view's operators. Compiled once per machine by numba and cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.spec import (
    MATRICES,
    Blur,
    Flip,
    Gray,
    Jitter,
    Normalize,
    Op,
    Params,
    VideoSpec,
    yuv_to_rgb_matrix,
)

_FLIP, _JITTER, _GRAY, _BLUR, _NORMALIZE = range(5)
_COLUMNS = 10  # of an operator's parameters: apply, four factors, four places of the order, sigma
_LUMA_WEIGHTS = (0.2989, 0.587, 0.114)

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "arcp", "nsz"}, boundscheck=False)


def supported(ops: Sequence[Op]) -> int:
    """How many operators from the front this kernel can run; the rest is for the torch reference."""
    for number, op in enumerate(ops):
        known = isinstance(op, Flip | Normalize | Gray) or (isinstance(op, Jitter) and op.maths == "torchvision")
        if not known and not (isinstance(op, Blur) and op.border == "reflect" and not op.vertical_only):
            return number
    return len(ops)


def augment_cpu(
    payload: np.ndarray, items: np.ndarray, spec: VideoSpec, ops: Sequence[Op], params: Sequence[Params]
) -> Tensor:
    """(B, 3, T, size, size) float32: crop, resize, convert, and run ``ops``, all of which must be supported.

    payload: flat uint8. items: (B, T) table. params: drawn parameters, N = B or B * T rows.
    """
    batch, frames = items.shape
    out = np.empty((batch, 3, frames, spec.size, spec.size), np.float32)
    codes, constants, drawn = _program(ops, params, batch * frames if spec.per_frame else batch)
    table = _plain(items)
    boxes = np.stack([items[name] for name in ("bx", "by", "bw", "bh")], -1).astype(np.float64)
    radius = 1 if spec.interpolation == "bilinear" else 2
    longest = float(boxes[..., 2:].max(initial=1.0))
    taps = 2 * math.ceil(radius * max(longest / spec.size, 1.0)) + 3
    arguments = (
        payload,
        table,
        boxes,
        _colours(),
        codes,
        constants,
        drawn,
        spec.per_frame,
        radius,
        spec.antialias,
        taps,
    )
    workers = max(1, min(torch.get_num_threads(), batch))
    bounds = np.linspace(0, batch, workers + 1).astype(int).tolist()
    jobs = [_pool(workers).submit(_run, *arguments, out, low, high) for low, high in pairwise(bounds)]
    for job in jobs:
        job.result()
    return torch.from_numpy(out)


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="clipmill-augment")


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


def _program(ops: Sequence[Op], params: Sequence[Params], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operator codes (K,), constants (K, 6) and drawn parameters (rows, K, _COLUMNS)."""
    codes = np.zeros(len(ops), np.int64)
    constants = np.zeros((len(ops), 6), np.float32)
    drawn = np.zeros((rows, len(ops), _COLUMNS), np.float32)
    for k, (op, drawn_op) in enumerate(zip(ops, params, strict=True)):
        if "apply" in drawn_op:
            drawn[:, k, 0] = drawn_op["apply"]
        if isinstance(op, Flip):
            codes[k] = _FLIP
        elif isinstance(op, Jitter):
            codes[k] = _JITTER
            drawn[:, k, 1:5], drawn[:, k, 5:9] = drawn_op["factors"], drawn_op["order"]
        elif isinstance(op, Gray):
            codes[k], constants[k, :3] = _GRAY, op.weights
        elif isinstance(op, Blur):
            codes[k], constants[k, 0] = _BLUR, op.taps
            drawn[:, k, 9] = drawn_op["sigma"]
        elif isinstance(op, Normalize):
            codes[k] = _NORMALIZE
            constants[k, :3], constants[k, 3:] = op.mean, 1.0 / np.asarray(op.std)
    return codes, constants, drawn


@_jit
def _run(payload, table, boxes, colour, codes, constants, drawn, per_frame, radius, antialias, taps, out, low, high):
    size = out.shape[-1]
    frames = table.shape[1]
    rgb = np.empty((3, size, size), np.float32)
    scratch = np.empty((3, size, size), np.float32)
    starts = np.empty((4, size), np.int64)
    weights = np.zeros((4, size, taps), np.float32)
    counts = np.empty((4, size), np.int64)
    for b in range(low, high):
        for t in range(frames):
            item, box = table[b, t], boxes[b, t]
            if t == 0 or per_frame:
                _weights(box[0], box[2], item[3], item[5], size, radius, antialias, starts[0], counts[0], weights[0])
                _weights(box[1], box[3], item[4], item[6], size, radius, antialias, starts[1], counts[1], weights[1])
                _halve(starts[0], counts[0], weights[0], starts[2], counts[2], weights[2])
                _halve(starts[1], counts[1], weights[1], starts[3], counts[3], weights[3])
            height, width = item[1], item[2]
            area = height * width
            luma = payload[item[0] : item[0] + area].reshape((height, width))
            chroma = payload[item[0] + area : item[0] + area * 3 // 2].reshape((2, height // 2, width // 2))
            _resize(luma, starts[1], counts[1], weights[1], starts[0], counts[0], weights[0], rgb[0])
            for plane in range(2):
                _resize(
                    chroma[plane], starts[3], counts[3], weights[3], starts[2], counts[2], weights[2], rgb[1 + plane]
                )
            _convert(rgb, colour[item[7]])
            row = b * frames + t if per_frame else b
            _operate(rgb, scratch, codes, constants, drawn[row])
            out[b, :, t] = rgb


@_jit
def _weights(start, length, low, high, size, radius, antialias, starts, counts, weights):
    scale = length / size
    stretch = scale if antialias and scale > 1.0 else 1.0
    reach = radius * stretch
    for i in range(size):
        centre = start + (i + 0.5) * scale
        first = max(low, math.floor(centre - reach - 0.5))
        last = min(high, math.ceil(centre + reach + 0.5))
        total = 0.0
        begin, count = -1, 0
        for j in range(first, last):
            x = abs(j + 0.5 - centre) / stretch
            if radius == 1:
                w = max(1.0 - x, 0.0)
            elif x < 1.0:
                w = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                w = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
            else:
                w = 0.0
            if w == 0.0 and begin < 0:
                continue
            if begin < 0:
                begin = j
            weights[i, count] = w
            count += 1
            total += w
        starts[i], counts[i] = begin, count
        for k in range(count):
            weights[i, k] /= total


@_jit
def _halve(starts, counts, weights, half_starts, half_counts, half_weights):
    """The weights of a chroma plane whose samples stand for two pixels each."""
    for i in range(len(starts)):
        first = starts[i] >> 1
        count = ((starts[i] + counts[i] - 1) >> 1) - first + 1
        half_starts[i], half_counts[i] = first, count
        for k in range(count):
            half_weights[i, k] = 0.0
        for k in range(counts[i]):
            half_weights[i, ((starts[i] + k) >> 1) - first] += weights[i, k]


@_jit
def _resize(plane, row_starts, row_counts, row_weights, starts, counts, weights, out):
    size = out.shape[0]
    low, high = starts[0], starts[size - 1] + counts[size - 1]
    line = np.empty(plane.shape[1], np.float32)
    for i in range(size):
        first = row_starts[i]
        w = row_weights[i, 0]
        for x in range(low, high):
            line[x] = w * plane[first, x]
        for k in range(1, row_counts[i]):
            w = row_weights[i, k]
            for x in range(low, high):
                line[x] += w * plane[first + k, x]
        for j in range(size):
            begin = starts[j]
            total = np.float32(0.0)
            for k in range(counts[j]):
                total += weights[j, k] * line[begin + k]
            out[i, j] = total


@_jit
def _convert(x, m):
    one, zero = np.float32(1.0), np.float32(0.0)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            y, u, v = x[0, i, j], x[1, i, j], x[2, i, j]
            x[0, i, j] = min(max(m[0] * y + m[1] * u + m[2] * v + m[9], zero), one)
            x[1, i, j] = min(max(m[3] * y + m[4] * u + m[5] * v + m[10], zero), one)
            x[2, i, j] = min(max(m[6] * y + m[7] * u + m[8] * v + m[11], zero), one)


@_jit
def _operate(x, scratch, codes, constants, drawn):
    for k in range(len(codes)):
        code, const, p = codes[k], constants[k], drawn[k]
        if code == _NORMALIZE:
            for c in range(3):
                mean, scale = const[c], const[3 + c]
                for i in range(x.shape[1]):
                    for j in range(x.shape[2]):
                        x[c, i, j] = (x[c, i, j] - mean) * scale
        elif p[0] == 0.0:
            continue
        elif code == _FLIP:
            last = x.shape[2] - 1
            for c in range(3):
                for i in range(x.shape[1]):
                    for j in range((last + 1) // 2):
                        x[c, i, j], x[c, i, last - j] = x[c, i, last - j], x[c, i, j]
        elif code == _GRAY:
            for i in range(x.shape[1]):
                for j in range(x.shape[2]):
                    grey = const[0] * x[0, i, j] + const[1] * x[1, i, j] + const[2] * x[2, i, j]
                    x[0, i, j] = x[1, i, j] = x[2, i, j] = grey
        elif code == _JITTER:
            for place in range(5, 9):
                which = int(p[place])
                if which == 0:
                    _blend(x, p[1], np.float32(0.0))
                elif which == 1:
                    _blend(x, p[2], _grey_mean(x))
                elif which == 2:
                    _saturate(x, p[3])
                else:
                    _turn_hue(x, p[4])
        else:
            _blur(x, scratch, p[9], int(const[0]))


@_jit
def _grey_mean(x):
    total = 0.0
    for i in range(x.shape[1]):
        line = np.float32(0.0)
        for j in range(x.shape[2]):
            line += (
                np.float32(_LUMA_WEIGHTS[0]) * x[0, i, j]
                + np.float32(_LUMA_WEIGHTS[1]) * x[1, i, j]
                + np.float32(_LUMA_WEIGHTS[2]) * x[2, i, j]
            )
        total += line
    return np.float32(total / (x.shape[1] * x.shape[2]))


@_jit
def _blend(x, factor, other):
    add = (np.float32(1.0) - factor) * other
    one, zero = np.float32(1.0), np.float32(0.0)
    for c in range(3):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                x[c, i, j] = min(max(factor * x[c, i, j] + add, zero), one)


@_jit
def _saturate(x, factor):
    rest = np.float32(1.0) - factor
    one, zero = np.float32(1.0), np.float32(0.0)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            r, g, b = x[0, i, j], x[1, i, j], x[2, i, j]
            grey = rest * (
                np.float32(_LUMA_WEIGHTS[0]) * r + np.float32(_LUMA_WEIGHTS[1]) * g + np.float32(_LUMA_WEIGHTS[2]) * b
            )
            x[0, i, j] = min(max(factor * r + grey, zero), one)
            x[1, i, j] = min(max(factor * g + grey, zero), one)
            x[2, i, j] = min(max(factor * b + grey, zero), one)


@_jit
def _turn_hue(x, turns):
    """Shift the hue; in the hexagon of HSV a colour is its value, its chroma and a position on the edge."""
    one, zero, six = np.float32(1.0), np.float32(0.0), np.float32(6.0)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            r, g, b = x[0, i, j], x[1, i, j], x[2, i, j]
            top, bottom = max(r, g, b), min(r, g, b)
            span = top - bottom
            inverse = one / span if span > zero else zero
            if top == r:
                h = (g - b) * inverse
            elif top == g:
                h = (b - r) * inverse + np.float32(2.0)
            else:
                h = (r - g) * inverse + np.float32(4.0)
            h += turns * six
            h -= six * np.float32(math.floor(h / six))
            for c in range(3):
                k = np.float32(5 - 2 * c) + h
                if k >= six:
                    k -= six
                x[c, i, j] = top - span * min(max(min(k, np.float32(4.0) - k), zero), one)


@_jit
def _blur(x, scratch, sigma, taps):
    radius = taps // 2
    kernel = np.empty(taps, np.float32)
    total = 0.0
    for k in range(taps):
        offset = (k - radius) / sigma
        kernel[k] = math.exp(-0.5 * offset * offset)
        total += kernel[k]
    used = 0  # taps beyond this are too small to change a float32
    for k in range(taps):
        kernel[k] /= total
        if k <= radius and kernel[k] < 1e-9:
            used = k + 1
    height, width = x.shape[1], x.shape[2]
    padded = np.empty(width + 2 * radius, np.float32)
    for c in range(3):
        for i in range(height):
            for j in range(width):
                padded[radius + j] = x[c, i, j]
            for j in range(radius):
                padded[radius - 1 - j] = x[c, i, 1 + j]
                padded[radius + width + j] = x[c, i, width - 2 - j]
            for j in range(width):
                scratch[c, i, j] = 0.0
            for k in range(used, taps - used):
                w = kernel[k]
                for j in range(width):
                    scratch[c, i, j] += w * padded[j + k]
        for i in range(height):
            for j in range(width):
                x[c, i, j] = 0.0
            for k in range(used, taps - used):
                source = i + k - radius
                if source < 0:
                    source = -source
                elif source >= height:
                    source = 2 * height - 2 - source
                w = kernel[k]
                for j in range(width):
                    x[c, i, j] += w * scratch[c, source, j]
