"""Triton resampling: the filter weights of a row of pictures, and tiles of a plane made with them.

Columns: output j is the sum over k of weights[k, j] * pixel[starts[j] + k]. Rows come in tiles of ROWS: source row
``begin + r`` of a tile is added to each of its rows with a weight of its own, weights[r, row], mostly 0. After the
weights of luma come those of planes of half its resolution. All weights are made in float64.
"""

# The decorator hides the types of kernels.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from clipmill.pipeline.kernels_steps import MIRROR, WIDTH

_WIDTH, _MIRROR = tl.constexpr(WIDTH), tl.constexpr(MIRROR)
_ITEM = tl.constexpr(16)  # int32 words of a `clipmill.pipeline.slot.ITEM`, whose order is known here


@triton.jit
def _tap(x, RADIUS: tl.constexpr):
    """The triangle (radius 1) or Keys's cubic with a = -1/2 (radius 2) at distance x."""
    if RADIUS == 1:
        weight = tl.maximum(1.0 - x, 0.0)
    else:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return weight


@triton.jit
def _lens(item, axis, SIZE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Of one axis of an item: start and scale of its box, stretch of the filter, and the readable pixels."""
    start = tl.load(item + 6 + axis).to(tl.float32, bitcast=True).to(tl.float64)
    scale = tl.load(item + 8 + axis).to(tl.float32, bitcast=True).to(tl.float64) / SIZE
    stretch = tl.maximum(scale, 1.0) if ANTIALIAS else scale * 0.0 + 1.0
    return start, scale, stretch, tl.load(item + 10 + axis), tl.load(item + 12 + axis)


@triton.jit
def _reach(centre, reach, low, high):
    """The first and the last pixel whose middle is nearer than ``reach``."""
    first = tl.floor(centre - reach - 0.5).to(tl.int32) + 1
    last = tl.ceil(centre + reach - 0.5).to(tl.int32) - 1
    return tl.maximum(first, low), tl.minimum(last, high - 1)


@triton.jit
def _weight(j, first, last, centre, stretch, RADIUS: tl.constexpr):
    """The weight, not normalised, of pixel j."""
    return tl.where((j >= first) & (j <= last), _tap(tl.abs(j + 0.5 - centre) / stretch, RADIUS), 0.0)


@triton.jit
def _window(count, limit):
    """How many pixels to read for ``count``: two or four if that is enough, but no more than there are."""
    return tl.minimum(tl.where(count <= 2, 2, tl.where(count <= 4, 4, count)), limit)


@triton.jit(do_not_specialize=["per_row", "depth", "taps"])
def filter_columns(
    words, numbers, starts, counts, weights, per_row, depth, taps, pitch,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, RADIUS: tl.constexpr, ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """Starts (2, pitch), counts (2,) and weights (taps + taps // 2 + 2, pitch) of one row of pictures."""
    row = tl.program_id(0).to(tl.int64)
    item = words + row * per_row * _ITEM
    start, scale, stretch, low, high = _lens(item, 0, SIZE, ANTIALIAS)
    width = tl.load(item + 4)
    i = tl.arange(0, BLOCK)
    here = i < SIZE
    centre = start + (i + 0.5) * scale
    first, last = _reach(centre, RADIUS * stretch, low, high)
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(taps):
        total += _weight(first + k, first, last, centre, stretch, RADIUS)
    total = tl.where(here, total, 1.0)
    mirrored = tl.load(numbers + row * depth * _WIDTH + _MIRROR).to(tl.int32)
    place = tl.where(here & (mirrored != 0), SIZE - 1 - i, i)
    inside = i < pitch
    count = _window(tl.max(tl.where(here, last - first + 1, 0)), width)
    begin = tl.where(here, tl.maximum(tl.minimum(first, width - count), 0), 0)
    tl.store(counts + row * 2, count)
    tl.store(starts + row * 2 * pitch + place, begin, mask=inside)
    weights += row * (taps + taps // 2 + 2) * pitch + place
    for k in range(count):
        weight = _weight(begin + k, first, last, centre, stretch, RADIUS) / total
        tl.store(weights + k * pitch, tl.where(here, weight, 0.0).to(tl.float32), mask=inside)
    half = first >> 1
    count = _window(tl.max(tl.where(here, (last >> 1) - half + 1, 0)), width // 2)
    begin = tl.where(here, tl.maximum(tl.minimum(half, width // 2 - count), 0), 0)
    tl.store(counts + row * 2 + 1, count)
    tl.store(starts + (row * 2 + 1) * pitch + place, begin, mask=inside)
    for k in range(count):
        j = 2 * (begin + k)
        weight = _weight(j, first, last, centre, stretch, RADIUS)
        weight = (weight + _weight(j + 1, first, last, centre, stretch, RADIUS)) / total
        tl.store(weights + (taps + k) * pitch, tl.where(here, weight, 0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["per_row", "taps", "span", "half_span", "down"])
def filter_rows(
    words, bands, weights, per_row, taps, span, half_span, down,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RADIUS: tl.constexpr, ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """Bands (down, 4): begin and count of luma, then of chroma; weights (down, span + half_span, ROWS)."""
    row = tl.program_id(0).to(tl.int64)
    start, scale, stretch, low, high = _lens(words + row * per_row * _ITEM, 1, SIZE, ANTIALIAS)
    i = tl.arange(0, BLOCK)
    top = i // ROWS * ROWS
    reach = RADIUS * stretch
    centre = start + (i + 0.5) * scale
    first, last = _reach(centre, reach, low, high)
    begin, _ = _reach(start + (top + 0.5) * scale, reach, low, high)
    _, end = _reach(start + (tl.minimum(top + ROWS, SIZE) - 0.5) * scale, reach, low, high)
    here, inside = i < SIZE, i < down * ROWS
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(taps):
        total += _weight(first + k, first, last, centre, stretch, RADIUS)
    total = tl.where(here, total, 1.0)
    count, half = end - begin + 1, begin >> 1
    half_count = (end >> 1) - half + 1
    bands += (row * down + i // ROWS) * 4
    leader = inside & (i == top)
    tl.store(bands, begin, mask=leader)
    tl.store(bands + 1, count, mask=leader)
    tl.store(bands + 2, half, mask=leader)
    tl.store(bands + 3, half_count, mask=leader)
    weights += (row * down + i // ROWS) * (span + half_span) * ROWS + i % ROWS
    for r in range(span):
        weight = _weight(begin + r, first, last, centre, stretch, RADIUS) / total
        tl.store(weights + r * ROWS, tl.where(here, weight, 0.0).to(tl.float32), mask=inside)
    for r in range(half_span):
        j = 2 * (half + r)
        weight = _weight(j, first, last, centre, stretch, RADIUS)
        weight = (weight + _weight(j + 1, first, last, centre, stretch, RADIUS)) / total
        tl.store(weights + (span + r) * ROWS, tl.where(here, weight, 0.0).to(tl.float32), mask=inside)


@triton.jit
def resample(
    plane, jump, height, width, y, count_y, weights_y, x, count_x, weights_x, pitch,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """A tile of a uint8 plane and, if PAIR, of the plane ``jump`` bytes behind it (else the same tile again).

    Reads ``count_y`` source rows from y on, and of each ``count_x`` pixels from x (1, COLUMNS) on.
    """
    if count_x == 2:
        a, b = _stream(plane, jump, height, width, y, count_y, weights_y, x, 2, weights_x, pitch, ROWS, UNROLL, PAIR, 2)
    elif count_x == 4:
        a, b = _stream(plane, jump, height, width, y, count_y, weights_y, x, 4, weights_x, pitch, ROWS, UNROLL, PAIR, 4)
    else:
        a, b = _stream(
            plane, jump, height, width, y, count_y, weights_y, x, count_x, weights_x, pitch, ROWS, UNROLL, PAIR, 0
        )
    return a, b


@triton.jit
def _stream(
    plane, jump, height, width, y, count_y, weights_y, x, count_x, weights_x, pitch,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, PAIR: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """`resample` with TAPS pixels a row, or any number if TAPS is 0.

    UNROLL rows at a time, so that their loads are on their way together; weights of rows beyond ``count_y`` are 0.
    """
    weights_y += tl.arange(0, ROWS)[:, None]
    a = tl.zeros([ROWS, x.shape[1]], tl.float32)
    b = tl.zeros([ROWS, x.shape[1]], tl.float32)
    for first in range(0, count_y, UNROLL):
        for r in tl.static_range(UNROLL):
            near = plane + tl.minimum(y + first + r, height - 1).to(tl.int64) * width + x
            weight = tl.load(weights_y + (first + r) * ROWS)
            a += weight * _line(near, count_x, weights_x, pitch, TAPS)
            if PAIR:
                b += weight * _line(near + jump, count_x, weights_x, pitch, TAPS)
    return a, b


@triton.jit
def _line(near, count_x, weights_x, pitch, TAPS: tl.constexpr):
    """One source row at the columns of a tile."""
    line = tl.zeros(near.shape, tl.float32)
    if TAPS > 0:
        for k in tl.static_range(TAPS):
            line += tl.load(weights_x + k * pitch) * tl.load(near + k).to(tl.float32)
    else:
        for k in range(count_x):
            line += tl.load(weights_x + k * pitch) * tl.load(near + k).to(tl.float32)
    return line
