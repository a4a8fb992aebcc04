"""Compiled steps: pointwise ones on blocks of sixteen pixels, and those that need the whole frame.

The maths of the operators of `clipmill.pipeline.augment`, in the encoding of `clipmill.pipeline.kernels_steps`.
"""

# Intrinsics are called without the first argument that they are written with.
# pyright: reportCallIssue=false

from __future__ import annotations

import math

import numpy as np

from clipmill.pipeline.jit import compiled, inlined
from clipmill.pipeline.kernels_steps import AFFINE, BLEND, SATURATE
from clipmill.pipeline.simd import larger, load16, smaller, store, where, whole


@inlined
def pointwise(p, r, g, b):
    """One step ``p`` (its code first) on the three channels of a block."""
    if p[0] == AFFINE:
        return (
            _clip(p[1] * r + p[4], p[7], p[8]),
            _clip(p[2] * g + p[5], p[7], p[8]),
            _clip(p[3] * b + p[6], p[7], p[8]),
        )
    if p[0] == BLEND:
        grey = (1.0 - p[1]) * (p[2] * r + p[3] * g + p[4] * b)
        return (
            _clip(p[1] * r + grey, p[5], p[6]),
            _clip(p[1] * g + grey, p[5], p[6]),
            _clip(p[1] * b + grey, p[5], p[6]),
        )
    top = larger(larger(r, g), b)
    span = top - smaller(smaller(r, g), b)
    coloured = span > 0.0
    inverse = where(coloured, 1.0 / where(coloured, span, 1.0), 0.0)
    if p[0] == SATURATE:  # S = span / top scales with the distances from the top, and is at most 1
        factor = smaller(p[1], where(coloured, top * inverse, 1.0))
        return top - factor * (top - r), top - factor * (top - g), top - factor * (top - b)
    sixths = where(top == r, (g - b) * inverse, where(top == g, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse))
    sixths = sixths + 6.0 * p[1]
    sixths = sixths - 6.0 * whole(sixths * (1.0 / 6.0))
    return _channel(top, span, 5.0 + sixths), _channel(top, span, 3.0 + sixths), _channel(top, span, 1.0 + sixths)


@inlined
def _clip(x, lowest, highest):
    return smaller(larger(x, lowest), highest)


@inlined
def _channel(top, span, k):
    """A channel of the colour whose value, chroma and place on HSV's hexagon (plus the channel's offset) are given."""
    k = where(k >= 6.0, k - 6.0, k)
    return top - span * _clip(smaller(k, 4.0 - k), 0.0, 1.0)


@compiled
def around_mean(p, sums, count):
    """Turn a contrast step into an affine one; sums: of the channels over ``count`` pixels."""
    factor, each = p[1], p[5] != 0.0
    grey = (p[2] * sums[0] + p[3] * sums[1] + p[4] * sums[2]) / count
    for c in range(3):
        p[4 + c] = (1.0 - factor) * (sums[c] / count if each else grey)
    p[0], p[1], p[2], p[3], p[7], p[8] = AFFINE, factor, factor, factor, 0.0, 1.0


@compiled
def cut(picture, size, pitch, p, factor):
    """Multiply the rectangle of a cutout step."""
    for c in range(3):
        for i in range(int(p[1]), int(p[3])):
            for j in range(int(p[2]), int(p[4])):
                picture[(c * size + i) * pitch + j] *= factor


@compiled
def blur(picture, spare, p, size, pitch):
    """Gaussian blur in place. spare: a picture of one row more per channel."""
    radius, zero_border, rows_only = int(p[2]) // 2, p[3] != 0.0, p[4] != 0.0
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / p[1]) ** 2)
    while radius > 0 and math.exp(-0.5 * (radius / p[1]) ** 2) / total < 1e-7:  # not seen in a float32 result
        radius -= 1
    taps = 2 * radius + 1
    kernel, along = np.empty(taps, np.float32), np.empty(taps, np.int64)
    for k in range(taps):
        along[k] = k
        kernel[k] = math.exp(-0.5 * ((k - radius) / p[1]) ** 2) / total
    rows = np.empty(size + 2 * radius, np.int64)  # the row that stands for each, beyond the border too
    for i in range(len(rows)):
        inside = radius <= i < size + radius
        rows[i] = size if zero_border and not inside else size - 1 - abs(size - 1 - abs(i - radius))
    jump, jump_spare, jump_line = size * pitch, (size + 1) * pitch, pitch + 2 * radius + 16
    line = np.zeros(3 * jump_line, np.float32)
    for c in range(3):
        for j in range(0, pitch, 16):
            store(spare, c * jump_spare + jump + j, load16(line, 0))
    for i in range(size):
        for c in range(3):
            at, middle = c * jump + i * pitch, c * jump_line + radius
            for j in range(0, pitch, 16):
                store(line, middle + j, load16(picture, at + j))
            for k in range(1, radius + 1):
                line[middle - k] = 0.0 if zero_border else picture[at + k]
                line[middle + size - 1 + k] = 0.0 if zero_border else picture[at + size - 1 - k]
        for j in range(0, pitch, 16):
            if rows_only:
                at = j + radius
                r, g, b = load16(line, at), load16(line, at + jump_line), load16(line, at + 2 * jump_line)
            else:
                r, g, b = _weighted(line, j, jump_line, kernel, along, 0, 1)
            store3(spare, i * pitch + j, jump_spare, r, g, b)
    for i in range(size):
        for j in range(0, pitch, 16):
            r, g, b = _weighted(spare, j, jump_spare, kernel, rows, i, pitch)
            store3(picture, i * pitch + j, jump, r, g, b)


@inlined
def _weighted(array, at, jump, kernel, places, first, step):
    """Sixteen pixels of each channel: the sum of kernel[k] * array[at + places[first + k] * step], k odd in number."""
    near = at + places[first] * step
    r, g, b = load16(array, near), load16(array, near + jump), load16(array, near + 2 * jump)
    r, g, b = kernel[0] * r, kernel[0] * g, kernel[0] * b
    r1 = g1 = b1 = r * 0.0  # a second sum, so that the processor need not wait for the first
    for k in range(1, len(kernel), 2):
        near = at + places[first + k] * step
        r = r + kernel[k] * load16(array, near)
        g = g + kernel[k] * load16(array, near + jump)
        b = b + kernel[k] * load16(array, near + 2 * jump)
        near = at + places[first + k + 1] * step
        r1 = r1 + kernel[k + 1] * load16(array, near)
        g1 = g1 + kernel[k + 1] * load16(array, near + jump)
        b1 = b1 + kernel[k + 1] * load16(array, near + 2 * jump)
    return r + r1, g + g1, b + b1


@inlined
def store3(array, at, jump, r, g, b):
    """Write a block of each channel; the channels lie ``jump`` apart."""
    store(array, at, r)
    store(array, at + jump, g)
    store(array, at + 2 * jump, b)
