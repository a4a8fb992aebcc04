"""Semantic segmentation with a fully convolutional head: the network, training samples and whole-picture answers.

J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, in the form that
DenseCL evaluates with (mmsegmentation's FCN-D8): a dilated ResNet, a head over its last stage that sees its own input
once more, and an auxiliary head over the stage before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.datasets.semantic import LEFT_OUT
from clipmill.models.backbones.resnet import FrameResNet
from clipmill.models.encoder import Encoder
from clipmill.pipeline.augment import brightness_add, brightness_scale, hue_shift, saturation_hsv
from clipmill.pipeline.draws import Draws

_CROP_ATTEMPTS = 10


# --- network ------------------------------------------------------------------------------------------------


class FCNHead(nn.Module):
    """convs times [3x3 convolution, BN, ReLU], then (concat) one more over input and outcome, dropout and 1x1.

    (B, dim, h, w) -> (B, classes, h, w). The classifier starts from N(0, 0.01^2).
    """

    def __init__(
        self, dim: int, classes: int, *, channels: int, convs: int, concat: bool, dropout: float = 0.1
    ) -> None:
        super().__init__()
        widths = [dim] + [channels] * convs
        self.convs = nn.Sequential(*(_block(*pair) for pair in pairwise(widths)))
        self.joint = _block(dim + (channels if convs else dim), channels) if concat else None
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels if convs or concat else dim, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores at the size of ``x``."""
        y = self.convs(x)
        if self.joint is not None:
            y = self.joint(torch.cat([x, y], 1))
        return self.classify(self.dropout(y))


def _block(dim: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(dim, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """An encoder of pictures under an FCN head: (B, 3, H, W) to class scores at the size of the last map.

    strides, dilations: of res2 to res5, for ResNets over frames; other encoders keep their own. frozen: the encoder's
    maps are constants. auxiliary: a second head over res4, for ResNets over frames.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        channels: int,
        convs: int,
        concat: bool,
        dropout: float,
        auxiliary: bool,
        frozen: bool,
        strides: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> None:
        super().__init__()
        if encoder.spec.modality != "video":
            raise ValueError(f"{type(encoder).__name__} hears; segmentation needs an encoder that sees")
        self.encoder, self.frozen = encoder, frozen
        self.options: dict[str, Any] = {}
        if isinstance(encoder, FrameResNet):
            self.options = {"strides": strides, "dilations": dilations}
        self.head = FCNHead(encoder.dim, classes, channels=channels, convs=convs, concat=concat, dropout=dropout)
        self.auxiliary: FCNHead | None = None
        if auxiliary:
            if not isinstance(encoder, FrameResNet):
                raise ValueError(f"{type(encoder).__name__} has no auxiliary head; use --auxiliary 0")
            block = encoder.layer3[-1]
            block.register_forward_hook(self._keep)
            dim = next(part for part in reversed(list(block.modules())) if isinstance(part, nn.BatchNorm2d))
            half = max(channels // 2, 1)
            self.auxiliary = FCNHead(dim.num_features, classes, channels=half, convs=1, concat=False, dropout=dropout)
        self._kept: Tensor | None = None

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._kept = output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the head, and of the auxiliary one in training."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder.maps(x[:, :, None], self.encoder.stages[-1], **self.options)[:, :, 0]
        extra = self.auxiliary(self._kept) if self.auxiliary is not None and self.training else None
        self._kept = None
        return self.head(maps), extra


def resized(scores_BKhw: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear interpolation of scores to (H, W)."""
    return F.interpolate(scores_BKhw.float(), size, mode="bilinear", align_corners=align_corners)


def whole(model: nn.Module, x_13HW: Tensor, align_corners: bool = False) -> Tensor:
    """Scores (1, K, H, W) of a picture that passes the network at once."""
    return resized(model(x_13HW)[0], (x_13HW.shape[2], x_13HW.shape[3]), align_corners)


def sliding(model: nn.Module, x_13HW: Tensor, window: int, stride: int, align_corners: bool = False) -> Tensor:
    """Scores (1, K, H, W) of a picture in overlapping windows, averaged where they overlap.

    Windows begin at multiples of ``stride``; the last of a row or column is moved back to end with the picture.
    """
    height, width = x_13HW.shape[2:]
    total: Tensor | None = None
    count = x_13HW.new_zeros(1, 1, height, width)
    for top in starts(height, window, stride):
        for left in starts(width, window, stride):
            area = (..., slice(top, top + window), slice(left, left + window))
            scores = whole(model, x_13HW[area], align_corners)
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], height, width)
            total[area] += scores
            count[area] += 1
    assert total is not None
    return total / count


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side.

    >>> starts(1024, 769, 513), starts(500, 769, 513)
    ([0, 255], [0])
    """
    number = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(number)]


# --- training samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """How a training picture is drawn.

    crop: side in pixels. short: short side pictures are scaled to first, None = as they are. scale: factor drawn from
    U(scale) on top. flip: probability of mirroring. photometric: brightness, contrast, saturation and hue, each with
    probability 0.5. most: a crop may be filled by one class up to this share; ten attempts.
    """

    crop: int
    short: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    most: float = 0.75


def drawn(picture_HW3: np.ndarray, ids_HW: np.ndarray, augment: Augment, rng: Draws) -> tuple[Tensor, Tensor]:
    """A training sample: (3, crop, crop) float32 in [0, 1], NaN where there is no picture, and int64 ids.

    Order as in the reference: scale, crop, mirror, colours, padding.
    """
    size = scaled(picture_HW3.shape[:2], augment.short, rng.uniform(*augment.scale))
    picture, ids = resize(picture_HW3, size), resize(ids_HW, size, Image.Resampling.NEAREST)
    rows, columns = (max(side - augment.crop, 0) for side in size)
    for _ in range(_CROP_ATTEMPTS):
        top, left = rng.integer(rows + 1), rng.integer(columns + 1)
        part = ids[top : top + augment.crop, left : left + augment.crop]
        counted = part[part != LEFT_OUT]
        if len(np.unique(counted)) > 1 and np.bincount(counted).max() < augment.most * len(counted):
            break
    picture = picture[top : top + augment.crop, left : left + augment.crop]
    if rng.coin(augment.flip):
        picture, part = picture[:, ::-1], part[:, ::-1]
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
    if augment.photometric:
        x = distorted(x, rng)
    y = torch.from_numpy(part.astype(np.int64))
    below, right = augment.crop - x.shape[1], augment.crop - x.shape[2]
    return F.pad(x, (0, right, 0, below), value=torch.nan), F.pad(y, (0, right, 0, below), value=LEFT_OUT)


def distorted(x_3HW: Tensor, rng: Draws) -> Tensor:
    """Colours as the reference distorts them: brightness +-32 levels, contrast and saturation 0.5-1.5, hue +-0.1 turn.

    Each with probability 0.5; contrast (a plain factor) comes before or after saturation and hue.
    """
    x = x_3HW[None, None]

    def factor(low: float, high: float) -> Tensor:
        return x.new_tensor(rng.uniform(low, high))

    if rng.coin():
        x = brightness_add(x, factor(1 - 32 / 255, 1 + 32 / 255))
    early, contrast = rng.coin(), rng.coin()
    if contrast and early:
        x = brightness_scale(x, factor(0.5, 1.5))
    if rng.coin():
        x = saturation_hsv(x, factor(0.5, 1.5))
    if rng.coin():
        x = hue_shift(x, factor(-0.1, 0.1))
    if contrast and not early:
        x = brightness_scale(x, factor(0.5, 1.5))
    return x[0, 0]


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per channel; what is no picture (NaN) becomes 0, the mean. x: (..., 3, H, W)."""
    shape = (-1, 1, 1)
    return ((x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)).nan_to_num(0.0)


def scaled(size: tuple[int, ...], short: int | None, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) after bringing the short side to ``short`` (None: as it is) and scaling by ``factor``.

    >>> scaled((375, 500), 512), scaled((100, 200), None, 0.5)
    ((512, 683), (50, 100))
    """
    share = factor * (1.0 if short is None else short / min(size))
    return max(1, int(size[0] * share + 0.5)), max(1, int(size[1] * share + 0.5))


def resize(array: np.ndarray, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """A picture or a mask at (height, width)."""
    if array.shape[:2] == size:
        return array
    return np.array(Image.fromarray(array).resize((size[1], size[0]), how))


def sample_numbers(count: int, seed: int) -> Iterator[tuple[int, int]]:
    """Without end: (sample, number of a picture), every picture once in each pass, in an order of the seed."""
    sample = 0
    epoch = 0
    while True:
        for number in Draws(seed, epoch, "order").shuffle(range(count)):
            yield sample, number
            sample += 1
        epoch += 1
