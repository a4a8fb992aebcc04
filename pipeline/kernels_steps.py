"""A view's operators as rows of numbers: the form in which the compiled kernels run them.

Every operator is one of few steps on the (r, g, b) of a pixel. Steps that change nothing for a row are left out, and
mirroring is a property of the row: every step gives the mirrored result on a mirrored picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipmill.pipeline.spec import Blur, Cutout, Flip, Gray, Jitter, Op, Params

WIDTH = 9  # numbers of a step: its code, then what is said after the code
END = 0  # nothing, and no step after it
AFFINE = 1  # scale r, g, b, add r, g, b, lowest, highest: clip(scale * x + add)
BLEND = 2  # factor, weights r, g, b, lowest, highest: clip(factor * x + (1 - factor) * weighted sum)
SATURATE = 3  # factor: scale S of HSV, at most to 1
HUE = 4  # turns: add to H of HSV
CONTRAST = 5  # factor, weights r, g, b, each: clip(factor * x + (1 - factor) * mean over the frame), the mean of the
#               weighted sum, or of every channel by itself if ``each`` is 1
BLUR = 6  # sigma, taps, zero border, rows only
CUTOUT = 7  # top, left, bottom, right: multiply the rectangle by the mean of the row's first frame

# A row's steps begin with its head:
MIRROR = 0  # 1 if the row's pictures are mirrored
STOP = 1  # number of the step after the last
MEAN = 2  # number of the first CONTRAST step, 0 if there is none
SMOOTH = 3  # number of the first BLUR step, 0 if there is none
SLOT = 4  # how many rows before this one have a BLUR step
ROW = 5  # (of row k) the k-th row that has a BLUR step

LUMA_WEIGHTS = (0.2989, 0.587, 0.114)
_FREE = (-3e38, 3e38)  # no clipping


def room(ops: Sequence[Op]) -> int:
    """How many steps, the row's head included, the operators may need."""
    return 1 + sum(4 if isinstance(op, Jitter) else 0 if isinstance(op, Flip) else 1 for op in ops)


def lower(ops: Sequence[Op], params: Sequence[Params], rows: int, size: int) -> np.ndarray:
    """(rows, room(ops), WIDTH) float32: the head and the steps of every row, then END.

    params: as drawn, ``rows`` rows each. size: side of the pictures in pixels. Raises ValueError if they are too
    small for a mirrored border.
    """
    flips = np.zeros(rows, bool)
    for op, drawn in zip(ops, params, strict=True):
        if isinstance(op, Flip):
            flips ^= drawn["apply"]
    turned = flips.copy()  # mirrored by an operator still to come
    steps = [_step(rows, 0, ())]
    clipped = True  # all values lie in [0, 1]
    for op, drawn in zip(ops, params, strict=True):
        if isinstance(op, Flip):
            turned ^= drawn["apply"]
        elif isinstance(op, Jitter):
            steps += _jitter(op, drawn, rows, clipped)
        elif isinstance(op, Gray):
            steps.append(_step(rows, BLEND * drawn["apply"], (0.0, *op.weights, *_FREE)))
        elif isinstance(op, Blur):
            if op.border == "reflect" and op.taps // 2 >= size:
                raise ValueError(f"a blur of {op.taps} taps needs pictures of more than {op.taps // 2} pixels: {size}")
            values = (drawn["sigma"], op.taps, op.border == "zero", op.vertical_only)
            steps.append(_step(rows, BLUR * drawn["apply"], values))
        elif isinstance(op, Cutout):
            steps.append(_step(rows, CUTOUT, _rectangle(drawn, turned, size)))
            clipped = False
        else:
            scale = 1.0 / np.asarray(op.std)
            steps.append(_step(rows, AFFINE, (*scale, *(-np.asarray(op.mean) * scale), *_FREE)))
            clipped = False
    return _with_head(np.stack(steps, 1), flips)


def _step(rows: int, code: np.ndarray | int, values: Sequence[np.ndarray | float]) -> np.ndarray:
    """(rows, WIDTH): one step of every row."""
    out = np.zeros((rows, WIDTH), np.float32)
    out[:, 0] = code
    for place, value in enumerate(values):
        out[:, 1 + place] = value
    return out


def _jitter(op: Jitter, drawn: Params, rows: int, clipped: bool) -> list[np.ndarray]:
    """The four steps of every row, in the order that the row drew."""
    brightness, contrast, saturation, hue = (drawn["factors"][:, i] for i in range(4))
    one, none, clip = (1.0,) * 3, (0.0,) * 3, (0.0, 1.0)
    if op.maths in ("kornia", "simclr_v1"):
        first = _step(rows, AFFINE, (*one, *(brightness - 1.0,) * 3, *clip))
    else:
        first = _step(rows, AFFINE, (*(brightness,) * 3, *none, *clip))
    if op.maths == "kornia":
        second = _step(rows, AFFINE, (*(contrast,) * 3, *none, *clip))
    else:
        second = _step(rows, CONTRAST, (contrast, *LUMA_WEIGHTS, op.maths != "torchvision"))
    if op.maths == "torchvision":
        third = _step(rows, BLEND, (saturation, *LUMA_WEIGHTS, *clip))
    else:
        third = _step(rows, SATURATE, (saturation,))
    four = np.stack([first, second, third, _step(rows, HUE, (hue,))], 1)
    idle = drawn["factors"] == (1.0, 1.0, 1.0, 0.0) if clipped else np.zeros((rows, 4), bool)
    four[:, :, 0] *= drawn["apply"][:, None] & ~idle
    order = drawn["order"].astype(np.int64)
    return list(np.take_along_axis(four, order[:, :, None], 1).swapaxes(0, 1))


def _rectangle(drawn: Params, turned: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Top, left, bottom and right of the cut square; mirrored where the row has already been mirrored for later."""
    half = drawn["side"].astype(np.int64) // 2
    row, column = ((drawn[name] * size).astype(np.int64) for name in ("row", "column"))
    left, right = np.maximum(column - half, 0), np.minimum(column + half, size)
    left, right = np.where(turned, size - right, left), np.where(turned, size - left, right)
    return np.maximum(row - half, 0), left, np.minimum(row + half, size), right


def _with_head(table: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Move the idle steps of every row to its end, and fill in step 0, the head."""
    order = np.argsort(table[:, 1:, 0] == END, axis=1, kind="stable")
    table[:, 1:] = np.take_along_axis(table[:, 1:], order[:, :, None], 1)
    codes, head = table[:, :, 0], table[:, 0]
    means, blurs = codes == CONTRAST, codes == BLUR
    smooth = blurs.any(1)
    head[:, STOP] = 1 + (codes[:, 1:] != END).sum(1)
    head[:, MEAN], head[:, SMOOTH] = means.argmax(1), blurs.argmax(1)
    head[:, SLOT] = np.cumsum(smooth) - smooth
    head[: smooth.sum(), ROW] = np.flatnonzero(smooth)
    head[:, MIRROR] = flips
    return table
