"""The augment kernel for GPUs: from packed I420 regions to normalised clips, written once.

Launches: the filter weights of every row; if some row changes its contrast, the channel sums of every frame up to
that step (the picture is made a second time rather than stored: its bytes in are a sixth of its bytes out); then the
picture itself with all its steps. Blurred rows go through two more launches and two float32 pictures. No atomics, so
the result is the same every time. Same maths as the torch reference (`clipmill.pipeline.augment`); filter weights in
float64, pixels in float32.
"""

# The decorator hides the types of kernels.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from clipmill.pipeline.kernels_steps import MEAN, SLOT, SMOOTH, STOP, WIDTH
from clipmill.pipeline.kernels_triton_colour import blur_across, blur_down, clip, first_of, place, run, store_tile
from clipmill.pipeline.kernels_triton_resize import filter_columns, filter_rows, resample
from clipmill.pipeline.spec import MATRICES, Blur, Cutout, Jitter, Op, VideoSpec, yuv_to_rgb_matrix

# A tile is one warp's work: 8 rows by up to 128 columns, 32 pixels of each channel a lane, which fit its registers.
# A source row is resampled once per tile and then added to the tile's rows by their weights: far fewer gathers than
# taps * taps per pixel, at any scale. Scales and steps are read by the kernel, not compiled in, and there is nothing to
# tune at run time: no compilation in the middle of a run, and the same sums in the same order every time.
_TILE_ROWS = 8
_TILE_COLUMNS = 128
_UNROLL = 4  # source rows of luma whose loads are on their way together; of chroma half as many of two planes

_WIDTH, _HEAD_STOP, _HEAD_MEAN, _HEAD_SMOOTH, _HEAD_SLOT = (
    tl.constexpr(number) for number in (WIDTH, STOP, MEAN, SMOOTH, SLOT)
)
_ITEM = tl.constexpr(16)  # int32 words of a `clipmill.pipeline.slot.ITEM`, whose order is known here


def fused(ops: Sequence[Op]) -> int:
    """How many operators from the front these kernels can run: to the first that needs another pass over the frame."""
    blurs = contrasts = 0
    for number, op in enumerate(ops):
        blurs += isinstance(op, Blur)
        contrasts += isinstance(op, Jitter) and op.maths != "kornia"
        mean_of_blurred = isinstance(op, Jitter) and op.maths != "kornia" and blurs > 0
        if isinstance(op, Cutout) or blurs > 1 or contrasts > 1 or mean_of_blurred:
            return number
    return len(ops)


def augment_gpu(
    payload: Tensor,
    items: np.ndarray,
    spec: VideoSpec,
    steps: np.ndarray,
    tables: tuple[Tensor, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, 3, T, size, size) of ``dtype``: crop, resize, convert, and run the steps.

    payload: flat uint8. items: (B, T) table. steps: of `clipmill.pipeline.kernels_steps.lower` for operators that
    `fused` admits, B rows or B * T. tables: the bytes of items and steps on the device.
    """
    batch, frames = items.shape
    size, rows, depth = spec.size, len(steps), steps.shape[1]
    per_row = batch * frames // rows
    device = payload.device
    words, numbers = tables[0].view(torch.int32), tables[1].view(torch.float32)
    radius = 1 if spec.interpolation == "bilinear" else 2
    longest = max(float(items["bw"].max(initial=1.0)), float(items["bh"].max(initial=1.0)))
    scale = max(longest / size, 1.0)
    taps = max(2 * math.ceil(radius * scale) + 1, 4)  # columns are read two or four at a time where that is enough
    span = -(-(math.ceil((_TILE_ROWS - 1) * scale) + taps + 1) // _UNROLL) * _UNROLL
    half_span = -(-(span // 2 + 2) // _UNROLL) * _UNROLL
    columns = min(_TILE_COLUMNS, triton.next_power_of_2(size))
    across, down = triton.cdiv(size, columns), triton.cdiv(size, _TILE_ROWS)
    tiles, pitch = across * down, across * columns
    blurs = steps[:, 0, SMOOTH] > 0
    smooth = int(blurs.sum()) * per_row

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    starts, counts = empty(rows, 2, pitch, kind=torch.int32), empty(rows, 2, kind=torch.int32)
    weights_x = empty(rows, taps + taps // 2 + 2, pitch)
    bands = empty(rows, down, 4, kind=torch.int32)
    weights_y = empty(rows, down, span + half_span, _TILE_ROWS)
    out = empty(batch, 3, frames, size, size, kind=dtype)
    sums, raw = empty(batch * frames, 3, tiles), empty(smooth, 3, size, size)
    lens = {"SIZE": size, "RADIUS": radius, "ANTIALIAS": spec.antialias, "num_warps": 4}
    shape = {"SIZE": size, "ROWS": _TILE_ROWS, "COLUMNS": columns, "TILES": tiles, "num_warps": 1}
    shape["TILES_BLOCK"] = triton.next_power_of_2(tiles)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        block = triton.next_power_of_2(pitch)
        filter_columns[(rows,)](
            words, numbers, starts, counts, weights_x, per_row, depth, taps, pitch, BLOCK=block, **lens
        )
        block = triton.next_power_of_2(down * _TILE_ROWS)
        filter_rows[(rows,)](
            words, bands, weights_y, per_row, taps, span, half_span, down, BLOCK=block, ROWS=_TILE_ROWS, **lens
        )
        inputs = (payload, words, numbers, starts, counts, weights_x, bands, weights_y, _colours(device))
        for only_sums in (True, False) if steps[:, 0, MEAN].any() else (False,):
            _frames[(batch * frames * tiles,)](
                *inputs, sums, raw, out, frames, per_row, depth, taps, pitch, span, half_span, down,
                SUMS=only_sums, UNROLL=_UNROLL, **shape,
            )  # fmt: skip
        if smooth:
            op = next(op for op in spec.ops if isinstance(op, Blur))
            turn = {"TAPS": op.taps, "TAPS_BLOCK": triton.next_power_of_2(op.taps), "ZERO": op.border == "zero"}
            source = raw
            if not op.vertical_only:
                source = torch.empty_like(raw)
                blur_across[(smooth * 3 * tiles,)](raw, source, numbers, per_row, depth, **shape, **turn)
            blur_down[(smooth * tiles,)](source, numbers, out, frames, per_row, depth, **shape, **turn)
    return out


@lru_cache(maxsize=16)
def _colours(device: torch.device) -> Tensor:
    """(2 * matrices, 12) float32: A and b of every YUV matrix, limited then full range."""
    rows = [yuv_to_rgb_matrix(name, full) for name in MATRICES for full in (False, True)]
    table = np.stack([np.concatenate([mix.reshape(-1), shift]) for mix, shift in rows])
    return torch.from_numpy(table.astype(np.float32)).to(device)


@triton.jit(do_not_specialize=["frames", "per_row", "depth", "taps", "span", "half_span", "down"])
def _frames(
    payload, words, numbers, starts, counts, weights_x, bands, weights_y, colours, sums, raw, out,
    frames, per_row, depth, taps, pitch, span, half_span, down,
    SUMS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile of one frame. SUMS: only the sums of its channels before its contrast step; else the tile itself."""
    frame = tl.program_id(0) // TILES
    row = (frame // per_row).to(tl.int64)
    step = numbers + row * depth * _WIDTH
    mean, smooth = tl.load(step + _HEAD_MEAN).to(tl.int32), tl.load(step + _HEAD_SMOOTH).to(tl.int32)
    if SUMS:  # noqa: SIM102 - the outer one is decided when compiling
        if mean == 0:
            return
    item = words + frame.to(tl.int64) * _ITEM
    offset = (tl.load(item + 1).to(tl.int64) << 32) | (tl.load(item).to(tl.int64) & 0xFFFFFFFF)
    width, height, colour = tl.load(item + 4), tl.load(item + 5), tl.load(item + 14)
    i, j = place(SIZE, ROWS, COLUMNS, TILES)
    band = row * down + tl.program_id(0) % TILES // ((SIZE + COLUMNS - 1) // COLUMNS)
    weights_y += band * (span + half_span) * ROWS
    bands += band * 4
    weights_x += row * (taps + taps // 2 + 2) * pitch + j[None, :]
    starts += row * 2 * pitch + j[None, :]
    counts += row * 2
    plane = payload + offset
    luma, _ = resample(
        plane, 0, height, width, tl.load(bands), tl.load(bands + 1), weights_y,
        tl.load(starts), tl.load(counts), weights_x, pitch, ROWS, UNROLL, False,
    )  # fmt: skip
    blue, red = resample(
        plane + height * width, height * width // 4, height // 2, width // 2, tl.load(bands + 2), tl.load(bands + 3),
        weights_y + span * ROWS, tl.load(starts + pitch), tl.load(counts + 1), weights_x + taps * pitch, pitch,
        ROWS, UNROLL // 2, True,
    )  # fmt: skip
    m = colours + 12 * (2 * (colour & 0xFFFF) + (colour >> 16))
    r = clip(tl.load(m) * luma + tl.load(m + 1) * blue + tl.load(m + 2) * red + tl.load(m + 9), 0.0, 1.0)
    g = clip(tl.load(m + 3) * luma + tl.load(m + 4) * blue + tl.load(m + 5) * red + tl.load(m + 10), 0.0, 1.0)
    b = clip(tl.load(m + 6) * luma + tl.load(m + 7) * blue + tl.load(m + 8) * red + tl.load(m + 11), 0.0, 1.0)
    part = sums + frame.to(tl.int64) * 3 * TILES
    if SUMS:
        r, g, b = run(step, 1, mean, r, g, b, 0.0, 0.0, 0.0)
        here = (i < SIZE)[:, None] & (j < SIZE)[None, :]
        part += tl.program_id(0) % TILES
        tl.store(part, tl.sum(tl.where(here, r, 0.0)))
        tl.store(part + TILES, tl.sum(tl.where(here, g, 0.0)))
        tl.store(part + 2 * TILES, tl.sum(tl.where(here, b, 0.0)))
    else:
        mean_r = _mean(part, mean, SIZE, TILES, TILES_BLOCK)
        mean_g = _mean(part + TILES, mean, SIZE, TILES, TILES_BLOCK)
        mean_b = _mean(part + 2 * TILES, mean, SIZE, TILES, TILES_BLOCK)
        stop = tl.load(step + _HEAD_STOP).to(tl.int32)
        r, g, b = run(step, 1, tl.where(smooth > 0, smooth, stop), r, g, b, mean_r, mean_g, mean_b)
        if smooth > 0:
            picture = tl.load(step + _HEAD_SLOT).to(tl.int64) * per_row + frame % per_row
            store_tile(raw + picture * 3 * SIZE * SIZE, SIZE * SIZE, i, j, r, g, b, SIZE)
        else:
            store_tile(out + first_of(frame, frames, SIZE), frames * SIZE * SIZE, i, j, r, g, b, SIZE)


@triton.jit
def _mean(part, wanted, SIZE: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr):
    """The mean of a channel from the sums of its tiles, in a fixed order; 0 if it is not wanted."""
    tile = tl.arange(0, TILES_BLOCK)
    return tl.sum(tl.load(part + tile, mask=(tile < TILES) & (wanted > 0), other=0.0)) / (SIZE * SIZE)
