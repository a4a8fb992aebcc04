"""Compiled resampling: filter weights of a row of pictures, and separable sums over columns and over rows.

Sums over columns run on planes turned eight rows at a time, so that one vector holds one column of eight rows.
"""

# Intrinsics are called without the first argument that they are written with.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import numpy as np

from clipmill.pipeline.jit import compiled, inlined
from clipmill.pipeline.simd import load8, load16, store, transpose8


@compiled
def filters(start, length, low, high, size, radius, antialias, mirror, starts, weights, half_starts, half_weights):
    """Fill the weights of one axis, for luma and for planes of half its resolution; returns the taps of both.

    Output i is the sum over k of weights[i * taps + k] * pixel[starts[i] + k]. A mirrored axis runs backwards.
    """
    scale = length / size
    stretch = scale if antialias and scale > 1.0 else 1.0
    taps = half_taps = 2
    for i in range(size):
        first, last = _reach(start + (i + 0.5) * scale, radius * stretch, low, high)
        taps, half_taps = max(taps, last - first + 1), max(half_taps, (last >> 1) - (first >> 1) + 1)
    weights[: len(starts) * taps] = 0.0
    half_weights[: len(starts) * half_taps] = 0.0
    for i in range(size):
        centre = start + (i + 0.5) * scale
        first, last = _reach(centre, radius * stretch, low, high)
        total = 0.0
        for j in range(first, last + 1):
            total += _tap(abs(j + 0.5 - centre) / stretch, radius)
        place = size - 1 - i if mirror else i
        half = first >> 1
        starts[place], half_starts[place] = first, half
        for j in range(first, last + 1):
            weight = np.float32(_tap(abs(j + 0.5 - centre) / stretch, radius) / total)
            weights[place * taps + j - first] = weight
            half_weights[place * half_taps + (j >> 1) - half] += weight
    return taps, half_taps


@inlined
def _reach(centre, reach, low, high):
    """The first and the last pixel whose middle is nearer than ``reach``."""
    return max(low, math.floor(centre - reach - 0.5) + 1), min(high - 1, math.ceil(centre + reach - 0.5) - 1)


@inlined
def _tap(x, radius):
    """The triangle (radius 1) or Keys's cubic with a = -1/2 (radius 2) at distance x."""
    if radius == 1:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0


@compiled
def columns(payload, base, height, width, starts, weights, taps, turned, plane, pitch):
    """Resample all rows of the uint8 plane at ``base`` to ``pitch`` columns of float32.

    turned: room for 8 * (width + taps). plane: room for ``height`` rows, rounded up to eights.
    """
    for i in range(0, height, 8):
        if width >= 8:
            for j in range(0, width, 8):
                x = min(j, width - 8)
                v = transpose8((
                    _row(payload, base, height, width, i, x), _row(payload, base, height, width, i + 1, x),
                    _row(payload, base, height, width, i + 2, x), _row(payload, base, height, width, i + 3, x),
                    _row(payload, base, height, width, i + 4, x), _row(payload, base, height, width, i + 5, x),
                    _row(payload, base, height, width, i + 6, x), _row(payload, base, height, width, i + 7, x),
                ))  # fmt: skip
                _store8(turned, 8 * x, 8, v)
        else:
            for x in range(width):
                for k in range(8):
                    turned[8 * x + k] = payload[base + min(i + k, height - 1) * width + x]
        for j in range(0, pitch, 8):
            v = transpose8((
                _column(turned, starts, weights, taps, j), _column(turned, starts, weights, taps, j + 1),
                _column(turned, starts, weights, taps, j + 2), _column(turned, starts, weights, taps, j + 3),
                _column(turned, starts, weights, taps, j + 4), _column(turned, starts, weights, taps, j + 5),
                _column(turned, starts, weights, taps, j + 6), _column(turned, starts, weights, taps, j + 7),
            ))  # fmt: skip
            _store8(plane, i * pitch + j, pitch, v)


@inlined
def _row(payload, base, height, width, i, x):
    """Eight pixels of row i, or of the last row if there is no such row."""
    return load8(payload, base + min(i, height - 1) * width + x)


@inlined
def _store8(array, at, step, v):
    store(array, at, v[0])
    store(array, at + step, v[1])
    store(array, at + 2 * step, v[2])
    store(array, at + 3 * step, v[3])
    store(array, at + 4 * step, v[4])
    store(array, at + 5 * step, v[5])
    store(array, at + 6 * step, v[6])
    store(array, at + 7 * step, v[7])


@inlined
def _column(turned, starts, weights, taps, j):
    """Output column j of eight rows."""
    at, w = 8 * starts[j], j * taps
    total = weights[w] * load8(turned, at) + weights[w + 1] * load8(turned, at + 8)
    for k in range(2, taps):
        total = total + weights[w + k] * load8(turned, at + 8 * k)
    return total


@inlined
def row(plane, pitch, starts, weights, taps, i, j):
    """Sixteen pixels, from column j on, of output row i of a plane whose columns are done."""
    at, w = starts[i] * pitch + j, i * taps
    total = weights[w] * load16(plane, at) + weights[w + 1] * load16(plane, at + pitch)
    for k in range(2, taps):
        total = total + weights[w + k] * load16(plane, at + k * pitch)
    return total
