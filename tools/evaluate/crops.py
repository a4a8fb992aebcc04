"""Where test crops are cut: the boxes of mmaction's `ThreeCrop` and `TenCrop` in test mode, and the centre."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipmill.pipeline.spec import Boxes

Box = tuple[int, int, int, int]


def _cut(x: int, y: int, size: int) -> Box:
    return x, y, x + size, y + size


def center_crop(height: int, width: int, size: int) -> list[Box]:
    """The centre box (x1, y1, x2, y2) of a frame, coordinates rounded down.

    >>> center_crop(256, 341, 256)
    [(42, 0, 298, 256)]
    """
    return [_cut((width - size) // 2, (height - size) // 2, size)]


def three_crop(height: int, width: int, size: int) -> list[Box]:
    """Boxes at both ends of the long side and in its middle; ``size`` must be the short side.

    >>> three_crop(256, 340, 256)
    [(0, 0, 256, 256), (84, 0, 340, 256), (42, 0, 298, 256)]
    """
    if size != min(height, width):
        raise ValueError(f"three crops need crops as large as the short side of {width}x{height}, got {size}")
    step = (max(height, width) - size) // 2
    places = (0, 2 * step, step)
    return [_cut(place, 0, size) if size == height else _cut(0, place, size) for place in places]


def ten_crop(height: int, width: int, size: int) -> list[Box]:
    """Boxes of the four corners and the centre, each twice: as it is and to be mirrored.

    Steps are rounded down to quarters of the room, so the right and lower crops may end up to 3 pixels early.

    >>> ten_crop(256, 455, 256)[2]
    (196, 0, 452, 256)
    """
    across, down = (width - size) // 4, (height - size) // 4
    places = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2))
    return [_cut(x * across, y * down, size) for x, y in places for _ in range(2)]


_CROPS: Mapping[str, Callable[[int, int, int], list[Box]]] = {"three": three_crop, "ten": ten_crop}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedCrop:
    """One of the boxes of `three_crop` or `ten_crop`, cut from the frame whose short side is resized to ``resize``.

    The long side is rounded to the nearest pixel, as mmaction does. Resizing reads beyond the crop's border.
    """

    size: int
    resize: int
    kind: Literal["three", "ten"]
    place: int

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames; nothing is drawn."""
        box, clamp = [], []
        for h, w in zip(height.tolist(), width.tolist(), strict=True):
            new_h, new_w = (int(side * self.resize / min(h, w) + 0.5) for side in (h, w))
            x, y, *_ = _CROPS[self.kind](new_h, new_w, self.size)[self.place]
            across, down = w / new_w, h / new_h
            box.append((x * across, y * down, self.size * across, self.size * down))
            clamp.append((0, 0, w, h))
        return Boxes(np.array(box, np.float64), np.array(clamp, np.int64))
