"""A SiamFC-style tracker on frozen features: the target of the first frame is searched for around its last place.

Settings and every step are those of VFS' tracking probe (Xu, Wang, arXiv 2103.17263; a descendant of siamfc-pytorch).
Many targets are tracked in lock-step, one frame of each per forward pass; they do not influence each other.

Boxes are x, y, width, height in pixels, the corner counted from 1; inside, places are (y, x) counted from 0.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.tools.tracker_crops import crop_inside, crop_padded, mean_colour
from clipmill.tools.tracker_head import Head, correlate, correlate_normalised

Features = Callable[[np.ndarray], Tensor]  # patches (N, S, S, 3) uint8 -> maps (N, C, h, w) float
Match = Literal["dot", "ncc"]
_AHEAD = 4  # pictures read in advance per target
_TINY = 1e-16
_FLAT = 1e-5  # relative height of a response that says nothing; enlarging makes that much of a constant


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSettings:
    """Constants of the tracker; the defaults are the published ones."""

    exemplar_size: int = 120
    """Side of the target patch shown to the network, in pixels."""
    instance_size: int = 255
    """Side of the search patch."""
    context: float = 0.5
    """Margin around the target, as a share of (width + height) / 2 on each side together."""
    scales: int = 3
    """Sizes tried per frame."""
    scale_step: float = 1.0375
    """Between one size and the next."""
    scale_rate: float = 0.59
    """How fast the size follows the best scale."""
    scale_penalty: float = 0.9745
    """Factor on responses at another scale; a bonus where they are negative, as in the original."""
    window_influence: float = 0.176
    """Share of the Hann window in the blended response."""
    response_size: int = 17
    """Cells the response is taken to have; it has one more at the default sizes, which the original overlooks."""
    response_up: int = 16
    """Enlargement of the response."""
    stride: int = 8
    """Pixels of a search patch per cell of its map."""
    crop: Literal["vfs", "siamfc"] = "vfs"
    """How patches are cut; the difference shows at image borders and in rounding."""

    def __post_init__(self) -> None:
        if not 0 < self.exemplar_size <= self.instance_size:
            raise ValueError(
                f"exemplar_size must lie between 1 and instance_size {self.instance_size}, got {self.exemplar_size}"
            )
        if self.scales < 1 or self.scales % 2 == 0 or self.scale_step <= 0:
            raise ValueError(f"scales must be odd and scale_step positive, got {self.scales} and {self.scale_step}")
        if min(self.response_size, self.response_up, self.stride) < 1:
            raise ValueError("response_size, response_up and stride must be at least 1")

    @property
    def factors(self) -> np.ndarray:
        """(S,) sizes of the search patch relative to the last one."""
        return self.scale_step ** np.linspace(-(self.scales // 2), self.scales // 2, self.scales)

    @property
    def up_size(self) -> int:
        """Side of the enlarged response."""
        return self.response_size * self.response_up

    def exemplar_side(self, size_hw: tuple[float, float]) -> float:
        """Side, in image pixels, of the square that shows a target with its margin."""
        margin = self.context * sum(size_hw)
        return math.sqrt((size_hw[0] + margin) * (size_hw[1] + margin))

    def search_side(self, size_hw: tuple[float, float]) -> float:
        """Side, in image pixels, of the square that is searched."""
        return self.exemplar_side(size_hw) * self.instance_size / self.exemplar_size


@dataclass(slots=True, kw_only=True)
class Target:
    """Where a target was last, and what it looked like at first.

    centre_yx, size_hw: in image pixels. kernel: (C, a, b). bias: added to all responses. border: colour around the
    picture, for the siamfc crop.
    """

    centre_yx: tuple[float, float]
    size_hw: tuple[float, float]
    kernel: Tensor
    bias: Tensor
    border: np.ndarray

    @property
    def box(self) -> np.ndarray:
        """(4,) x, y, width, height; may leave the picture."""
        (y, x), (height, width) = self.centre_yx, self.size_hw
        return np.array([x + 1 - (width - 1) / 2, y + 1 - (height - 1) / 2, width, height])


class Tracker:
    """Starts targets and follows them.

    features: gives maps of patches, frozen, of one stride. head: trained convolutions; None correlates the features
    themselves. match: plain correlation, or the normalised one (without a head only). pool: cuts patches in threads.
    """

    def __init__(
        self,
        features: Features,
        settings: TrackerSettings,
        head: Head | None = None,
        match: Match = "dot",
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        if head is not None and match != "dot":
            raise ValueError("a trained head is meant for plain correlation; use match dot")
        self.features, self.settings, self.head, self.match, self.pool = features, settings, head, match, pool
        window = np.hanning(settings.up_size)
        outer = np.outer(window, window)
        self._window = torch.from_numpy(outer / outer.sum())

    @torch.no_grad()
    def start(self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[Target]:
        """Targets from their first pictures (H, W, 3) uint8 and boxes (4,); ValueError for a box without a size."""
        settings = self.settings
        places = []
        for box in boxes:
            x, y, width, height = map(float, box)
            if not (math.isfinite(x + y + width + height) and width > 0 and height > 0):
                raise ValueError(f"a target cannot start from the box {np.asarray(box).tolist()}; it needs a size")
            places.append(((y - 1 + (height - 1) / 2, x - 1 + (width - 1) / 2), (height, width)))
        borders = [mean_colour(picture) for picture in pictures]
        jobs = [
            (picture, centre, settings.exemplar_side(size), settings.exemplar_size, border)
            for picture, (centre, size), border in zip(pictures, places, borders, strict=True)
        ]
        maps = self._maps(jobs)
        if self.head is not None:
            kernels, biases = self.head.fold(maps)
        else:
            kernels, biases = maps, maps.new_zeros(len(maps))
        return [
            Target(centre_yx=centre, size_hw=size, kernel=kernel, bias=bias, border=border)
            for (centre, size), kernel, bias, border in zip(places, kernels, biases, borders, strict=True)
        ]

    @torch.no_grad()
    def step(self, targets: Sequence[Target], pictures: Sequence[np.ndarray]) -> None:
        """Find every target in its next picture and move it there."""
        settings = self.settings
        sides = [settings.search_side(target.size_hw) for target in targets]
        jobs = []
        for target, picture, side in zip(targets, pictures, sides, strict=True):
            border = mean_colour(picture) if settings.crop == "vfs" else target.border
            jobs += [(picture, target.centre_yx, side * f, settings.instance_size, border) for f in settings.factors]
        maps = self._maps(jobs).unflatten(0, (len(targets), settings.scales))
        kernels = torch.stack([target.kernel for target in targets])
        if self.match == "dot":
            responses = correlate(kernels, maps) + torch.stack([t.bias for t in targets]).view(-1, 1, 1, 1)
        else:
            responses = correlate_normalised(kernels, maps)
        for target, side, (scale, row, column) in zip(targets, sides, self._peaks(responses), strict=True):
            self._move(target, side, scale, (row, column))

    def _maps(self, jobs: list[tuple]) -> Tensor:
        cut = crop_inside if self.settings.crop == "vfs" else crop_padded
        work = self.pool.map if self.pool is not None and len(jobs) > 3 else map
        return self.features(np.stack(list(work(lambda job: cut(*job), jobs))))

    def _peaks(self, responses_BShw: Tensor) -> list[list[int]]:
        """(scale, row, column) of each target in the enlarged responses."""
        settings, up = self.settings, self.settings.up_size
        if not torch.isfinite(responses_BShw).all():
            raise ValueError("the responses are not finite; the encoder or the head may have diverged")
        large = F.interpolate(responses_BShw, (up, up), mode="bicubic", align_corners=False)
        factor = large.new_full((settings.scales,), settings.scale_penalty)
        factor[settings.scales // 2] = 1.0
        large = large * factor.view(-1, 1, 1)
        scale = large.flatten(2).amax(2).argmax(1)
        best = large[torch.arange(len(large), device=large.device), scale].double()
        low, high = best.amin((1, 2), keepdim=True), best.amax((1, 2), keepdim=True)
        best = torch.where(high - low > _FLAT * high.abs(), best - low, 0.0)  # else it is rounding, made large below
        best = best / (best.sum((1, 2), keepdim=True) + _TINY)
        share = settings.window_influence
        place = ((1 - share) * best + share * self._window.to(best.device)).flatten(1).argmax(1)
        return torch.stack([scale, place // up, place % up], 1).tolist()

    def _move(self, target: Target, side: float, scale: int, place: tuple[int, int]) -> None:
        settings = self.settings
        factor = float(settings.factors[scale])
        step = settings.stride / settings.response_up * side * factor / settings.instance_size
        y, x = (c + (p - (settings.up_size - 1) / 2) * step for c, p in zip(target.centre_yx, place, strict=True))
        growth = (1 - settings.scale_rate) + settings.scale_rate * factor
        height, width = (n * growth for n in target.size_hw)
        target.centre_yx, target.size_hw = (y, x), (height, width)


# --- whole videos -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The outcome for one video: boxes (T, 4), the first as given, and seconds per frame (T,), reading excluded."""

    boxes: np.ndarray
    seconds: np.ndarray


@dataclass(slots=True)
class _Lane:
    number: int
    pictures: deque[Future]
    waiting: Iterator[Path]
    boxes: list[np.ndarray]
    seconds: list[float]
    target: Target | None = None


def track(
    tracker: Tracker,
    videos: Sequence[tuple[Sequence[Path], np.ndarray]],
    read: Callable[[Path], np.ndarray],
    *,
    lanes: int = 1,
    threads: int = 2,
    done: Callable[[int], None] = lambda frames: None,
) -> Iterator[tuple[int, Tracked]]:
    """Track the target of every video, given as (frames, first box); yields (number, outcome) as videos finish.

    lanes: videos in lock-step. A frame's time is its share of the step it was in. threads: readers. done: told after
    every step how many frames it was.
    """
    todo = deque(enumerate(videos))
    active: list[_Lane] = []
    with ThreadPoolExecutor(threads, "frames") as pool:
        while todo or active:
            while todo and len(active) < lanes:
                number, (frames, box) = todo.popleft()
                paths = iter(frames)
                ahead = deque(pool.submit(read, path) for path in islice(paths, _AHEAD))
                active.append(_Lane(number, ahead, paths, [np.asarray(box, np.float64)], []))
            pictures = [lane.pictures.popleft().result() for lane in active]
            for lane in active:
                lane.pictures.extend(pool.submit(read, path) for path in islice(lane.waiting, 1))
            since = time.perf_counter()
            new = [(lane, picture) for lane, picture in zip(active, pictures, strict=True) if lane.target is None]
            old = [(lane, picture) for lane, picture in zip(active, pictures, strict=True) if lane.target is not None]
            if old:
                tracker.step([lane.target for lane, _ in old if lane.target], [picture for _, picture in old])
            if new:
                targets = tracker.start([picture for _, picture in new], [lane.boxes[0] for lane, _ in new])
                for (lane, _), target in zip(new, targets, strict=True):
                    lane.target = target
            spent = (time.perf_counter() - since) / len(active)
            for lane, _ in old:
                assert lane.target is not None
                lane.boxes.append(lane.target.box)
            for lane in active:
                lane.seconds.append(spent)
            done(len(active))
            for lane in [lane for lane in active if not lane.pictures]:
                active.remove(lane)
                yield lane.number, Tracked(boxes=np.array(lane.boxes), seconds=np.array(lane.seconds))
