"""Augmentation as data: what a view does to raw pixels or samples, and the random parameters it draws.

No torch here: decode workers draw the crops (so that only the needed region is copied) and the device applies the
rest (`clipmill.pipeline.augment`). All parameters of a batch are drawn at once from 64-bit keys, one per clip or one
per frame, so they do not depend on batch size, threads or world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from clipmill.pipeline.draws import fold_array, uniforms
from clipmill.pipeline.sound_spec import AudioSpec as AudioSpec
from clipmill.pipeline.sound_spec import LogMel as LogMel
from clipmill.pipeline.sound_spec import Mask as Mask
from clipmill.pipeline.sound_spec import Params, Range, between
from clipmill.pipeline.sound_spec import Volume as Volume

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)

MATRICES = ("bt601", "bt709", "bt2020")  # YUV matrices, by the number stored with an item

_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


def yuv_to_rgb_matrix(matrix: str, full_range: bool) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) A and (3,) b with rgb = A @ (y, u, v) + b, for 8-bit planes and RGB in [0, 1]."""
    kr, kb = _LUMA[matrix]
    kg = 1.0 - kr - kb
    luma, chroma, black = (255.0, 255.0, 0.0) if full_range else (219.0, 224.0, 16.0)
    mix = np.array(
        [
            [1.0, 0.0, 2 * (1 - kr)],
            [1.0, -2 * kb * (1 - kb) / kg, -2 * kr * (1 - kr) / kg],
            [1.0, 2 * (1 - kb), 0.0],
        ]
    )
    mix = mix / np.array([luma, chroma, chroma])
    return mix, -mix @ np.array([black, 128.0, 128.0])


def _integer(unit: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Uniform integers in [0, count)."""
    return np.minimum((unit * count).astype(np.int64), count - 1)


# --- crops: which part of the frame, in source pixels -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Boxes:
    """Crops of N frames in source pixels.

    box: (N, 4) float64 x, y, width, height of the area that becomes the output. clamp: (N, 4) int64 x0, y0, x1, y1,
    the pixels that resizing may read (a crop that is cut first reads only itself).
    """

    box: np.ndarray
    clamp: np.ndarray

    @staticmethod
    def cut(x: np.ndarray, y: np.ndarray, w: np.ndarray, h: np.ndarray) -> Boxes:
        """Integer crops that are cut out before they are resized."""
        box = np.stack([x, y, w, h], -1)
        return Boxes(box.astype(np.float64), np.stack([x, y, x + w, y + h], -1).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomResizedCrop:
    """The torchvision sampler: area fraction U(scale), log-aspect U(log ratio), 10 attempts, else the centre.

    fallback: the shape of that centre, the nearest allowed ``aspect`` or, as in mmaction, a ``square``.
    """

    scale: Range = (0.2, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    fallback: Literal["aspect", "square"] = "aspect"

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames of the given sizes; ``keys`` (N,) uint64."""
        unit = uniforms(keys, 22)
        area = (height * width)[:, None] * between(unit[:, :10], self.scale)
        aspect = np.exp(between(unit[:, 10:20], (math.log(self.ratio[0]), math.log(self.ratio[1]))))
        ws = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        hs = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (ws > 0) & (hs > 0) & (ws <= width[:, None]) & (hs <= height[:, None])
        first, rows = fits.argmax(1), np.arange(len(keys))
        found = fits.any(1)
        w, h = self._fallback(height, width)
        x, y = (width - w) // 2, (height - h) // 2
        w, h = np.where(found, ws[rows, first], w), np.where(found, hs[rows, first], h)
        x = np.where(found, _integer(unit[:, 20], width - w + 1), x)
        y = np.where(found, _integer(unit[:, 21], height - h + 1), y)
        return Boxes.cut(x, y, w, h)

    def _fallback(self, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Widths and heights of the centre."""
        if self.fallback == "square":
            side = np.minimum(height, width)
            return side, side
        shape = width / height
        wide, tall = shape > self.ratio[1], shape < self.ratio[0]
        w = np.where(wide, np.rint(height * self.ratio[1]), width).astype(np.int64)
        h = np.where(tall, np.rint(width / self.ratio[0]), height).astype(np.int64)
        return w, h


@dataclass(frozen=True, slots=True, kw_only=True)
class DistortedBox:
    """TensorFlow's sampler of distorted boxes, the crop of SimCLR's reference.

    aspect (width / height) from U(ratio), not its logarithm; then the height, uniform over the integers for which
    the area can lie in ``scale``, which favours small crops; up to 100 attempts, else the whole frame. The reference
    asks for 8 to 100 % of the area but also for a tenth of the frame to be covered, so the least is 10 %.
    """

    scale: Range = (0.1, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    attempts: int = 100

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames of the given sizes; ``keys`` (N,) uint64."""
        x, y, w, h = np.zeros_like(width), np.zeros_like(height), width.copy(), height.copy()
        waiting = np.arange(len(keys))
        for attempt in range(self.attempts):
            unit = uniforms(fold_array(keys[waiting], attempt), 4)
            frame_h, frame_w = height[waiting], width[waiting]
            aspect = between(unit[:, 0], self.ratio)
            least, most = (share * frame_h * frame_w for share in self.scale)
            low = np.rint(np.sqrt(least / aspect)).astype(np.int64)
            fitting = np.minimum(frame_h, ((frame_w + 0.5 - 1e-7) / aspect).astype(np.int64))
            high = np.minimum(np.rint(np.sqrt(most / aspect)).astype(np.int64), fitting)
            tall = low + _integer(unit[:, 1], np.maximum(high - low, 0) + 1)
            wide = np.rint(tall * aspect).astype(np.int64)
            tall += (wide * tall < least).astype(np.int64) - (wide * tall > most)  # what rounding has missed
            wide = np.rint(tall * aspect).astype(np.int64)
            area = wide * tall
            good = (area >= least) & (area <= most) & (tall <= frame_h) & (wide <= frame_w) & (area > 0)
            rows = waiting[good]
            w[rows], h[rows] = wide[good], tall[good]
            x[rows] = _integer(unit[good, 2], np.maximum(frame_w - wide, 1)[good])
            y[rows] = _integer(unit[good, 3], np.maximum(frame_h - tall, 1)[good])
            waiting = waiting[~good]
            if not len(waiting):
                break
        return Boxes.cut(x, y, w, h)


def _resized(height: np.ndarray, width: np.ndarray, short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes after resizing the short side to ``short``; the long side is truncated, as torchvision does."""
    side = np.minimum(height, width)
    return short * height // side, short * width // side


def _window(height: np.ndarray, width: np.ndarray, new: tuple, top: np.ndarray, left: np.ndarray, size: int) -> Boxes:
    """The source area of a ``size`` crop at (top, left) of the frame resized to ``new``."""
    down, across = height / new[0], width / new[1]
    box = np.stack([left * across, top * down, size * across, size * down], -1)
    zero = np.zeros_like(height)
    return Boxes(box, np.stack([zero, zero, width, height], -1).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterCrop:
    """Resize the short side to ``resize`` pixels, cut the centre ``size`` pixels (resize = size: the whole side).

    Equal to torchvision's Resize and CenterCrop: resizing reads beyond the crop's border.
    """

    size: int
    resize: int

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"cannot cut {self.size} pixels from a short side of {self.resize}")

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames; nothing is drawn."""
        new = _resized(height, width, np.full_like(height, self.resize))
        top, left = (np.rint((side - self.size) / 2) for side in new)
        return _window(height, width, new, top, left, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCenter:
    """Cut the centre square of ``share`` of the short side, then resize it: the test crop of SimCLR's reference.

    The side is rounded, the offsets are half the rest, rounded up. Resizing reads nothing beyond the crop. Frames of at
    most ``whole`` pixels are not cut, as the reference does with pictures of 32.
    """

    share: float = 0.875
    whole: int = 32

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames; nothing is drawn."""
        short = np.minimum(height, width)
        side = np.where(np.maximum(height, width) <= self.whole, short, np.rint(self.share * short)).astype(np.int64)
        return Boxes.cut((width - side + 1) // 2, (height - side + 1) // 2, side, side)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizedRandomCrop:
    """Resize the short side to an integer from U{resize}, cut ``size`` pixels at a random place (scale jitter)."""

    size: int
    resize: tuple[int, int]

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize[0] <= self.resize[1]:
            raise ValueError(f"cannot cut {self.size} pixels from a short side of {self.resize[0]}..{self.resize[1]}")

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames; ``keys`` (N,) uint64."""
        unit = uniforms(keys, 3)
        short = self.resize[0] + _integer(unit[:, 0], np.full_like(height, self.resize[1] - self.resize[0] + 1))
        new = _resized(height, width, short)
        top, left = (_integer(unit[:, 1 + axis], new[axis] - self.size + 1) for axis in range(2))
        return _window(height, width, new, top, left, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFrame:
    """The whole frame, squashed to the output size."""

    def boxes(self, keys: np.ndarray, height: np.ndarray, width: np.ndarray) -> Boxes:
        """Boxes for N frames; nothing is drawn."""
        zero = np.zeros_like(height)
        return Boxes.cut(zero, zero, width, height)


Crop = RandomResizedCrop | DistortedBox | CenterCrop | CutCenter | ResizedRandomCrop | WholeFrame


# --- operators on the cropped picture, values in [0, 1] until Normalize -------------------------------------

Scope = Literal["item", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """Mirror left-right with probability ``p``."""

    p: float = 0.5

    def draw(self, keys: np.ndarray) -> Params:
        """apply: bool, shape of ``keys``."""
        return {"apply": uniforms(keys, 1)[..., 0] < self.p}


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Brightness, contrast, saturation and hue in random order, each clipped to [0, 1] afterwards.

    brightness, contrast, saturation: factors from U(max(0, 1 - v), 1 + v). hue: shift from U(-hue, hue) turns.
    p: probability of jittering at all; ``coin`` says whether that is decided per item or once per batch.
    maths: ``torchvision`` (contrast around the grey mean, saturation blends with grey), ``simclr`` (contrast around
    each channel's mean, saturation scales S of HSV), ``simclr_v1`` (the same, but brightness adds v - 1), ``kornia``
    (brightness adds v - 1, contrast multiplies, saturation scales S).
    order: ``item`` draws a random order per item, ``batch`` one per batch, ``fixed`` keeps b, c, s, h.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    maths: Literal["torchvision", "simclr", "simclr_v1", "kornia"] = "torchvision"
    coin: Scope = "item"
    order: Literal["item", "batch", "fixed"] = "item"

    def draw(self, keys: np.ndarray) -> Params:
        """apply, factors (..., 4) in the order b, c, s, h, and order (..., 4) of operator numbers."""
        unit = uniforms(keys, 9)
        factors = [between(unit[..., i], (max(0.0, 1 - v), 1 + v)) for i, v in enumerate(self._strengths())]
        factors.append(between(unit[..., 3], (-self.hue, self.hue)))
        order = np.argsort(unit[..., 5:9], axis=-1)
        if self.order == "fixed":
            order = np.broadcast_to(np.arange(4), order.shape).copy()
        return {"apply": unit[..., 4] < self.p, "factors": np.stack(factors, -1), "order": order}

    def _strengths(self) -> tuple[float, float, float]:
        return self.brightness, self.contrast, self.saturation


@dataclass(frozen=True, slots=True, kw_only=True)
class Gray:
    """Luma in all three channels with probability ``p``."""

    p: float = 0.2
    weights: tuple[float, float, float] = (0.2989, 0.587, 0.114)

    def draw(self, keys: np.ndarray) -> Params:
        """apply: bool, shape of ``keys``."""
        return {"apply": uniforms(keys, 1)[..., 0] < self.p}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blur:
    """Gaussian blur with probability ``p``, sigma from U(sigma) in output pixels.

    kernel: taps per side (odd); 0 takes 2 * ceil(3 * max sigma) + 1. border: ``reflect`` (without repeating the edge)
    or ``zero``. coin, strength: whether the decision and sigma are drawn per item or once per batch. vertical_only:
    blur rows only, as a known slip of CrissCross's code does.
    """

    p: float = 0.5
    sigma: Range = (0.1, 2.0)
    kernel: int = 0
    border: Literal["reflect", "zero"] = "reflect"
    coin: Scope = "item"
    strength: Scope = "item"
    vertical_only: bool = False

    def draw(self, keys: np.ndarray) -> Params:
        """apply and sigma, shape of ``keys``."""
        unit = uniforms(keys, 2)
        return {"apply": unit[..., 0] < self.p, "sigma": between(unit[..., 1], self.sigma)}

    @property
    def taps(self) -> int:
        """Kernel side in pixels."""
        return self.kernel or 2 * math.ceil(3 * self.sigma[1]) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutout:
    """Multiply one square, side U{1..max_side}, by the mean of the first normalised frame (CrissCross)."""

    max_side: int = 20

    def draw(self, keys: np.ndarray) -> Params:
        """side (pixels), and centre row and column as fractions of the picture."""
        unit = uniforms(keys, 3)
        return {"side": 1 + np.floor(unit[..., 0] * self.max_side), "row": unit[..., 1], "column": unit[..., 2]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalize:
    """(x - mean) / std per channel."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def draw(self, keys: np.ndarray) -> Params:
        """Nothing is drawn."""
        return {}


Op = Flip | Jitter | Gray | Blur | Cutout | Normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """From decoded frames to a (B, C, T, size, size) tensor: crop and resize, then ``ops`` in order.

    size: output side in pixels. per_frame: every frame draws its own crop and operators; otherwise the frames of a
    clip share them. one_crop: with per_frame, the frames of a clip share their crop all the same. interpolation:
    ``bilinear`` or ``bicubic`` (Keys, a = -0.5). antialias: low-pass filter when shrinking, as torchvision does.
    """

    size: int = 112
    crop: Crop = field(default_factory=RandomResizedCrop)
    ops: tuple[Op, ...] = (Flip(), Normalize())
    per_frame: bool = False
    one_crop: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True

    def item_keys(self, draws: np.ndarray, num_frames: int, view_key: str) -> np.ndarray:
        """(B,) keys of a view, or (B * num_frames,) when every frame draws its own."""
        keys = fold_array(draws, view_key)
        if self.per_frame:
            keys = fold_array(np.repeat(keys, num_frames), np.tile(np.arange(num_frames), len(draws)))
        return keys

    def crop_keys(self, draws: np.ndarray, num_frames: int, view_key: str) -> np.ndarray:
        """As `item_keys`, for crops."""
        if self.per_frame and self.one_crop:
            return np.repeat(fold_array(draws, view_key), num_frames)
        return self.item_keys(draws, num_frames, view_key)

    def reach(self, lengths: np.ndarray) -> np.ndarray:
        """How many pixels beyond boxes of the given source lengths their resize to ``size`` may read."""
        stretch = np.maximum(lengths / self.size, 1.0) if self.antialias else np.ones_like(lengths)
        return np.ceil((1 if self.interpolation == "bilinear" else 2) * stretch).astype(np.int64) + 1


def eval_spec(size: int, resize: int | None = None, ops: tuple[Op, ...] = (Normalize(),)) -> VideoSpec:
    """The usual test transform: short side to ``resize`` (default size / 0.875), centre crop, normalise."""
    return VideoSpec(size=size, crop=CenterCrop(size=size, resize=resize or round(size / 0.875)), ops=ops)


# --- published recipes --------------------------------------------------------------------------------------


def moco_v1(size: int = 224, per_frame: bool = False) -> VideoSpec:
    """MoCo v1 (He et al., CVPR 2020): crop, grey p 0.2, jitter 0.4 always, flip."""
    ops = (Gray(), Jitter(hue=0.4, p=1.0), Flip(), Normalize())
    return VideoSpec(size=size, ops=ops, per_frame=per_frame)


def moco_v2(size: int = 224, per_frame: bool = False) -> VideoSpec:
    """MoCo v2 (Chen et al., 2020): crop, jitter (0.4, 0.4, 0.4, 0.1) p 0.8, grey p 0.2, blur p 0.5, flip."""
    ops = (Jitter(), Gray(), Blur(), Flip(), Normalize())
    return VideoSpec(size=size, ops=ops, per_frame=per_frame)


def simclr(
    size: int = 224, strength: float = 1.0, blur: bool = True, *, maths: Literal["simclr", "simclr_v1"] = "simclr"
) -> VideoSpec:
    """SimCLR (Chen et al., ICML 2020): bicubic crop of 8-100 %, flip, strong jitter, grey, blur; no normalisation.

    The operators are the reference's (``simclr_v1``: with the paper's additive brightness); the crop is torchvision's,
    which all PyTorch versions have. The reference's is `DistortedBox`.
    """
    jitter = Jitter(
        brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength, maths=maths
    )
    taps = 2 * (size // 10 // 2) + 1
    ops: tuple[Op, ...] = (Flip(), jitter, Gray())
    if blur:
        ops = (*ops, Blur(kernel=taps, border="zero", strength="batch"))
    crop = RandomResizedCrop(scale=(0.08, 1.0))
    return VideoSpec(size=size, crop=crop, ops=ops, interpolation="bicubic", antialias=False)


def hcl(size: int = 32) -> VideoSpec:
    """HCL (Robinson et al., ICLR 2021): crop of 8-100 %, flip, jitter p 0.8, grey p 0.2, blur of size / 10 taps p 0.5.

    Normalised with the statistics of CIFAR on all data sets.
    """
    taps = size // 10 | 1
    ops = (Flip(), Jitter(), Gray(), Blur(kernel=taps), Normalize(mean=CIFAR_MEAN, std=CIFAR_STD))
    return VideoSpec(size=size, crop=RandomResizedCrop(scale=(0.08, 1.0)), ops=ops)
