"""The frame pairs of ContrastCorr: Lab pictures rotated, scaled and cut as the released code does it.

Both stages begin with whole frames. Stage A gives two crops of one size at places of their own; stage B a crop of the
reference and the whole target. Geometry works on 8-bit pictures (`clipmill.models.resample8`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models.colour import lab8_from_rgb
from clipmill.models.resample8 import Window, padded, resized, rotated

MOST_DEGREES = 10
MOST_SCALE = 1.2


class PairDraws(NamedTuple):
    """Numbers in [0, 1) of each sample, (B,): the geometry's draws. Only the places differ between the frames."""

    angle: Tensor
    ratio: Tensor
    flip: Tensor
    reference_x: Tensor
    reference_y: Tensor
    target_x: Tensor
    target_y: Tensor


def warm_pair(
    reference: Tensor,
    target: Tensor,
    sizes: Sequence[tuple[int, int]],
    draws: PairDraws,
    size: int,
    frame: int,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """Stage A: two 8-bit Lab crops (B, 3, size, size).

    reference, target: squashed frames (B, 3, S, S), RGB in [0, 1]. sizes: (height, width) the videos have. multiple:
    see `loaded`. Rotation, scale and flip are shared. frame is not used.
    """
    crops: tuple[list[Tensor], list[Tensor]] = ([], [])
    for b, (height, width) in enumerate(sizes):
        angle, ratio, flip, *places = (float(column[b]) for column in draws)
        for x, to, (across, down) in zip((reference, target), crops, (places[:2], places[2:]), strict=True):
            lab8 = rotated(loaded(x[b], height, width, multiple), degrees_of(angle))
            lab8 = scaled_crop(lab8, ratio_of(ratio), size, across, down)
            to.append(lab8.flip(-1) if flip < 0.5 else lab8)
    return torch.stack(crops[0]), torch.stack(crops[1])


def joint_pair(
    reference: Tensor,
    target: Tensor,
    sizes: Sequence[tuple[int, int]],
    draws: PairDraws,
    size: int,
    frame: int,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """Stage B: 8-bit Lab, a crop of the reference (B, 3, size, size) and the whole target (B, 3, frame, frame).

    Arguments as in `warm_pair`. The reference is rotated, but neither scaled nor flipped.
    """
    crops, wholes = [], []
    for b, (height, width) in enumerate(sizes):
        angle, across, down = (float(column[b]) for column in (draws.angle, draws.reference_x, draws.reference_y))
        turned = rotated(loaded(reference[b], height, width, multiple), degrees_of(angle))
        crops.append(crop(whole(turned, frame), size, across, down))
        wholes.append(whole(loaded(target[b], height, width, multiple), frame))
    return torch.stack(crops), torch.stack(wholes)


def degrees_of(draw: float) -> int:
    """A whole angle from -10 to 10 degrees."""
    return int(draw * (2 * MOST_DEGREES + 1)) - MOST_DEGREES


def ratio_of(draw: float) -> float:
    """A factor from U(1 / 1.2, 1.2)."""
    return 1 / MOST_SCALE + draw * (MOST_SCALE - 1 / MOST_SCALE)


def loaded(x: Tensor, height: int, width: int, multiple: int) -> Tensor:
    """A squashed RGB frame (3, S, S) in [0, 1] as 8-bit Lab, its sides the multiples below the video's own."""
    to = (max(height // multiple, 1) * multiple, max(width // multiple, 1) * multiple)
    rgb = F.interpolate(x[None].float(), to, mode="bilinear", align_corners=False)
    return lab8_from_rgb(rgb)[0].long()


def scaled_crop(lab8: Tensor, ratio: float, size: int, across: float, down: float) -> Tensor:
    """Sides times ``ratio``, rounded down, by Lanczos to shrink and bicubic to enlarge; then `crop`."""
    height, width = (int(ratio * side) for side in lab8.shape[-2:])
    kernel = "lanczos4" if ratio < 1 else "cubic"
    if min(height, width) < size:
        return crop(resized(lab8, height, width, kernel), size, across, down)
    window = Window(place(down, height, size), place(across, width, size), size, size)
    return resized(lab8, height, width, kernel, window)


def whole(lab8: Tensor, side: int) -> Tensor:
    """The longer side becomes ``side``, the shorter one is rounded down and then mirrored to a square."""
    height, width = lab8.shape[-2:]
    share = side / max(height, width)
    to = (side if height >= width else int(height * share), side if width >= height else int(width * share))
    return padded(resized(lab8, *to), side, side)


def crop(lab8: Tensor, size: int, across: float, down: float) -> Tensor:
    """A square of ``size`` at a place from two draws in [0, 1); too short sides are mirrored first."""
    lab8 = padded(lab8, size, size)
    top, left = place(down, lab8.shape[-2], size), place(across, lab8.shape[-1], size)
    return lab8[..., top : top + size, left : left + size]


def place(draw: float, side: int, size: int) -> int:
    """Where a piece of ``size`` begins in a line of ``side`` pixels, any with the same chance; draw: in [0, 1)."""
    return int(draw * (side - size + 1))
