"""Training pairs of a tracking head: two frames of a sequence, cut around the target and shaken a little.

The recipe is siamfc-pytorch's as VFS uses it (Xu, Wang, arXiv 2103.17263): both frames are cut with the geometry of a
search patch; a pair is a pure function of (seed, epoch, sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipmill.datasets.files import text_of
from clipmill.datasets.got10k import Track
from clipmill.datasets.source import CorpusError
from clipmill.pipeline.draws import Draws
from clipmill.tools.tracker import TrackerSettings
from clipmill.tools.tracker_crops import KINDS, crop_inside, crop_padded, mean_colour, paste, resize

STRETCH = 0.05
SHAKE = 8  # pixels: centre crop and random crop each take this much off the search patch
_TRIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """A sequence and the numbers (n,) of its frames that can be trained on."""

    track: Track
    frames: np.ndarray


def valid_frames(boxes: np.ndarray, image_hw: Sequence[int], cover: np.ndarray | None = None) -> np.ndarray:
    """Numbers of the frames whose target is neither tiny, huge, thin nor mostly hidden.

    boxes: (T, 4). cover: (T,) how much can be seen; more than 1 and than 0.3 of the sequence's most is asked for.
    """
    width, height = boxes[:, 2], boxes[:, 3]
    sides = boxes[:, 2:]
    share = sides / np.array([image_hw[1], image_hw[0]])
    aspect = width / np.maximum(1, height)
    good = (width * height >= 20) & (sides >= 20).all(1) & (sides <= 500).all(1)
    good &= (share >= 0.01).all(1) & (share <= 0.5).all(1) & (aspect >= 0.25) & (aspect <= 4)
    if cover is not None:
        good &= cover > max(1.0, 0.3 * cover.max())
    return np.flatnonzero(good)


def usable(tracks: Sequence[Track]) -> list[Usable]:
    """The sequences with a valid frame; ValueError if there is none. The size of a sequence is its first image's."""
    found = []
    for track in tracks:
        frames = valid_frames(track.boxes, _size_hw(track.frames[0]), track.cover)
        if len(frames):
            found.append(Usable(track=track, frames=frames))
    if not found:
        raise ValueError(
            f"none of {len(tracks)} sequences has a target of 20 to 500 pixels that fills at most half the image; "
            "a head cannot be trained on them"
        )
    return found


def _size_hw(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise CorpusError(f"{text_of(path)}: not a picture ({error}); unpack the corpus again") from error


def draw_frames(frames: np.ndarray, draws: Draws, max_gap: int = 100) -> tuple[int, int]:
    """Two distinct frames less than ``max_gap`` apart, the earlier one first; one frame twice if none are found."""
    if len(frames) > 1:
        for _ in range(_TRIES):
            a, b = sorted(int(frames[i]) for i in draws.distinct(len(frames), 2))
            if b - a < max_gap:
                return a, b
    only = int(frames[draws.integer(len(frames))])
    return only, only


def training_pair(
    sequence: Usable,
    draws: Draws,
    settings: TrackerSettings,
    read: Callable[[Path], np.ndarray],
    max_gap: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Target patch (E, E, 3) and search patch (I - 16, I - 16, 3), uint8, of one drawn pair."""
    track = sequence.track
    first, second = draw_frames(sequence.frames, draws, max_gap)
    z, x = (_shaken(read(track.frames[t]), track.boxes[t], draws, settings) for t in (first, second))
    return centre_crop(z, settings.exemplar_size), x


def _shaken(picture: np.ndarray, box: np.ndarray, draws: Draws, settings: TrackerSettings) -> np.ndarray:
    """Cut a search patch around the box, stretch it, and cut a smaller one at a random place near its middle."""
    x, y, width, height = map(float, box)
    centre = y - 1 + (height - 1) / 2, x - 1 + (width - 1) / 2
    size = settings.instance_size
    cut = crop_inside if settings.crop == "vfs" else crop_padded
    kind = KINDS[draws.integer(len(KINDS))]
    patch = cut(picture, centre, settings.search_side((height, width)), size, mean_colour(picture), kind)
    stretched = round(size * (1 + draws.uniform(-STRETCH, STRETCH)))
    patch = resize(patch, stretched, stretched, KINDS[draws.integer(len(KINDS))])
    patch = centre_crop(patch, size - SHAKE)
    top, left = draws.integer(SHAKE + 1), draws.integer(SHAKE + 1)
    return patch[top : top + size - 2 * SHAKE, left : left + size - 2 * SHAKE]


def centre_crop(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle (side, side, 3); a smaller picture is framed with its average colour."""
    top, left = (round((n - side) / 2) for n in picture.shape[:2])
    if top >= 0 and left >= 0:
        return picture[top : top + side, left : left + side]
    framed = np.tile(mean_colour(picture), (side, side, 1))
    paste(framed, picture, -top, -left)
    return framed
