"""Triton steps: pointwise ones on a tile of three channels, and the separable blur.

The maths of the operators of `clipmill.pipeline.augment`, in the encoding of `clipmill.pipeline.kernels_steps`.
"""

# The decorator hides the types of kernels.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from clipmill.pipeline.kernels_steps import AFFINE, BLEND, CONTRAST, ROW, SATURATE, SMOOTH, STOP, WIDTH

_WIDTH, _HEAD_STOP, _HEAD_SMOOTH, _HEAD_ROW = (tl.constexpr(number) for number in (WIDTH, STOP, SMOOTH, ROW))
_AFFINE, _BLEND, _SATURATE, _CONTRAST = (tl.constexpr(code) for code in (AFFINE, BLEND, SATURATE, CONTRAST))


@triton.jit
def clip(x, lowest, highest):
    """x, but not below ``lowest`` or above ``highest``."""
    return tl.minimum(tl.maximum(x, lowest), highest)


@triton.jit
def _hexagon(top, span, k):
    """A channel of the colour whose value, chroma and place on HSV's hexagon (plus the channel's offset) are given."""
    k = tl.where(k >= 6.0, k - 6.0, k)
    return top - span * clip(tl.minimum(k, 4.0 - k), 0.0, 1.0)


@triton.jit
def run(step, first, stop, r, g, b, mean_r, mean_g, mean_b):
    """Steps [first, stop) of a row on a tile; the means are those of the frame's channels before its contrast step."""
    for k in range(first, stop):
        p = step + k * _WIDTH
        code = tl.load(p)
        p1, p2, p3, p4 = tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)
        p5, p6, p7, p8 = tl.load(p + 5), tl.load(p + 6), tl.load(p + 7), tl.load(p + 8)
        if code == _AFFINE:
            r, g, b = clip(p1 * r + p4, p7, p8), clip(p2 * g + p5, p7, p8), clip(p3 * b + p6, p7, p8)
        elif code == _BLEND:
            grey = (1.0 - p1) * (p2 * r + p3 * g + p4 * b)
            r, g, b = clip(p1 * r + grey, p5, p6), clip(p1 * g + grey, p5, p6), clip(p1 * b + grey, p5, p6)
        elif code == _CONTRAST:
            grey, each = p2 * mean_r + p3 * mean_g + p4 * mean_b, p5 != 0.0
            rest = 1.0 - p1
            r = clip(p1 * r + rest * tl.where(each, mean_r, grey), 0.0, 1.0)
            g = clip(p1 * g + rest * tl.where(each, mean_g, grey), 0.0, 1.0)
            b = clip(p1 * b + rest * tl.where(each, mean_b, grey), 0.0, 1.0)
        else:
            top = tl.maximum(tl.maximum(r, g), b)
            span = top - tl.minimum(tl.minimum(r, g), b)
            coloured = span > 0.0
            inverse = tl.where(coloured, 1.0 / tl.where(coloured, span, 1.0), 0.0)
            if code == _SATURATE:
                factor = tl.minimum(tl.where(coloured, top * inverse, 1.0), p1)
                r, g, b = top - factor * (top - r), top - factor * (top - g), top - factor * (top - b)
            else:
                sixths = tl.where(g == top, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse)
                sixths = tl.where(r == top, (g - b) * inverse, sixths) + 6.0 * p1
                sixths -= 6.0 * tl.floor(sixths * (1.0 / 6.0))
                r, g = _hexagon(top, span, 5.0 + sixths), _hexagon(top, span, 3.0 + sixths)
                b = _hexagon(top, span, 1.0 + sixths)
    return r, g, b


@triton.jit
def place(SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """The rows and columns of this program's tile."""
    tile = tl.program_id(0) % TILES
    across = (SIZE + COLUMNS - 1) // COLUMNS
    return tile // across * ROWS + tl.arange(0, ROWS), tile % across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def first_of(frame, frames, SIZE: tl.constexpr):
    """Where frame number ``frame`` of a batch begins in (B, 3, T, SIZE, SIZE)."""
    return (frame // frames * 3 * frames + frame % frames).to(tl.int64) * SIZE * SIZE


@triton.jit
def store_tile(target, jump, i, j, r, g, b, SIZE: tl.constexpr):
    """Write a tile of three channels that lie ``jump`` apart."""
    here = (i < SIZE)[:, None] & (j < SIZE)[None, :]
    target += i[:, None] * SIZE + j[None, :]
    tl.store(target, r.to(target.dtype.element_ty), mask=here)
    tl.store(target + jump, g.to(target.dtype.element_ty), mask=here)
    tl.store(target + 2 * jump, b.to(target.dtype.element_ty), mask=here)


@triton.jit
def _gaussian(numbers, slot, depth, TAPS: tl.constexpr, TAPS_BLOCK: tl.constexpr):
    """Of the slot-th blurred row: its steps, the number of its blur, 1 / sigma, 1 / sum of the weights, reach."""
    row = tl.load(numbers + slot.to(tl.int64) * depth * _WIDTH + _HEAD_ROW).to(tl.int64)
    step = numbers + row * depth * _WIDTH
    smooth = tl.load(step + _HEAD_SMOOTH).to(tl.int32)
    inverse = 1.0 / tl.load(step + smooth * _WIDTH + 1)
    tap = tl.arange(0, TAPS_BLOCK)
    far = (tap - TAPS // 2) * inverse
    total = tl.sum(tl.where(tap < TAPS, tl.exp(-0.5 * far * far), 0.0))
    reach = tl.minimum(TAPS // 2, tl.ceil(6.0 / inverse).to(tl.int32))  # what lies beyond is below 2e-8
    return step, smooth, inverse, 1.0 / total, reach


@triton.jit
def _mirrored(i, SIZE: tl.constexpr):
    """Pixel numbers beyond the border, reflected without repeating it."""
    return tl.maximum(SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(i)), 0)


@triton.jit(do_not_specialize=["per_row", "depth"])
def blur_across(
    source, target, numbers, per_row, depth,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr,
    TAPS: tl.constexpr, TAPS_BLOCK: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Blur the rows of a tile of one channel of one picture."""
    plane = (tl.program_id(0) // TILES).to(tl.int64)
    _, _, inverse, scale, reach = _gaussian(numbers, plane // 3 // per_row, depth, TAPS, TAPS_BLOCK)
    i, j = place(SIZE, ROWS, COLUMNS, TILES)
    here = (i < SIZE)[:, None] & (j < SIZE)[None, :]
    source += plane * SIZE * SIZE + i[:, None] * SIZE
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(2 * reach + 1):
        near = j + k - reach
        seen = here & ((near >= 0) & (near < SIZE))[None, :] if ZERO else here
        far = (k - reach) * inverse
        total += tl.exp(-0.5 * far * far) * tl.load(source + _mirrored(near, SIZE)[None, :], mask=seen, other=0.0)
    tl.store(target + plane * SIZE * SIZE + i[:, None] * SIZE + j[None, :], total * scale, mask=here)


@triton.jit(do_not_specialize=["frames", "per_row", "depth"])
def blur_down(
    source, numbers, out, frames, per_row, depth,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr,
    TAPS: tl.constexpr, TAPS_BLOCK: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Blur the columns of a tile of one picture, and run the steps that follow."""
    picture = (tl.program_id(0) // TILES).to(tl.int64)
    slot = picture // per_row
    step, smooth, inverse, scale, reach = _gaussian(numbers, slot, depth, TAPS, TAPS_BLOCK)
    i, j = place(SIZE, ROWS, COLUMNS, TILES)
    here_y, here_x = i < SIZE, j < SIZE
    source += picture * 3 * SIZE * SIZE + j[None, :]
    r = tl.zeros([ROWS, COLUMNS], tl.float32)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(2 * reach + 1):
        near = i + k - reach
        seen = here_y & (near >= 0) & (near < SIZE) if ZERO else here_y
        here = seen[:, None] & here_x[None, :]
        line = source + _mirrored(near, SIZE)[:, None] * SIZE
        far = (k - reach) * inverse
        weight = tl.exp(-0.5 * far * far) * scale
        r += weight * tl.load(line, mask=here, other=0.0)
        g += weight * tl.load(line + SIZE * SIZE, mask=here, other=0.0)
        b += weight * tl.load(line + 2 * SIZE * SIZE, mask=here, other=0.0)
    stop = tl.load(step + _HEAD_STOP).to(tl.int32)
    r, g, b = run(step, smooth + 1, stop, r, g, b, 0.0, 0.0, 0.0)
    row = tl.load(numbers + slot * depth * _WIDTH + _HEAD_ROW).to(tl.int64)
    frame = row * per_row + picture % per_row
    store_tile(out + first_of(frame, frames, SIZE), frames * SIZE * SIZE, i, j, r, g, b, SIZE)
