"""What the backbone families share: scaled widths, stage options, nets of blocks, first weights, inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.encoder import Encoder, InputSpec

STAGES = ("stem", "res2", "res3", "res4", "res5")

Init = Literal["fan_out", "fan_in", "variance_scaling"]


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded to a multiple of 8, at least 8; untouched at width 1.

    >>> scaled(45, 1), scaled(45, 0.5), scaled(64, 0.125), scaled(64, 0.01)
    (45, 24, 8, 8)
    """
    if not width > 0 or math.isinf(width):
        raise ValueError(f"width must be a positive number, got {width}")
    return channels if width == 1 else max(8, int(channels * width / 8 + 0.5) * 8)


def stage_values(option: str, values: Sequence[int]) -> tuple[int, ...]:
    """Check an option with one positive integer for each of the stages res2 to res5."""
    if len(values) != 4 or any(int(value) != value or value < 1 for value in values):
        raise ValueError(f"{option} must be 4 positive integers, one for each of res2 to res5, got {tuple(values)}")
    return tuple(int(value) for value in values)


def stage_strides(option: str, values: Sequence[int]) -> tuple[int, ...]:
    """As `stage_values`; res2 keeps the size of the stem, for its first shortcut may have no convolution."""
    strides = stage_values(option, values)
    if strides[0] != 1:
        raise ValueError(f"{option} must begin with 1, got {strides}: res2 keeps the size of the stem")
    return strides


def reductions_of(stem: tuple[int, ...], *strides: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Input cells per map cell of each stage: the stem's, times the stage strides of every dimension.

    >>> reductions_of((1, 4), (1, 1, 1, 1), (1, 2, 2, 2))["res4"]
    (1, 16)
    """
    columns = [list(accumulate(stages, mul, initial=first)) for first, stages in zip(stem, strides, strict=True)]
    return dict(zip(STAGES, zip(*columns, strict=True), strict=True))


def video_spec(num_frames: int, size: int, stride: int = 1, channels: int = 3) -> InputSpec:
    """The usual input of a video backbone; for other than 3 channels nothing is known of mean and std."""
    if channels == 3:
        return InputSpec(num_frames=num_frames, size=size, stride=stride)
    mean, std = (0.0,) * channels, (1.0,) * channels
    return InputSpec(num_frames=num_frames, size=size, stride=stride, channels=channels, mean=mean, std=std)


class BlockNet(Encoder):
    """Five blocks over (B, C, T, H, W) and perhaps one that pools; features are the global average of the last."""

    stages = STAGES

    def __init__(
        self, blocks: nn.ModuleList, dim: int, spec: InputSpec, reductions: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.dim, self.spec, self.reductions = dim, spec, reductions

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, T', H', W') of clips after ``stage``."""
        self.check(x)
        for block in self.blocks[: self.depth(stage) + 1]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): what the classifier would see, averaged over the clip."""
        x = self.maps(x, "res5")
        for pooling in self.blocks[len(STAGES) :]:
            x = pooling(x)
        return x.mean((2, 3, 4))


class HalvingPool(nn.Module):
    """2x2x2 max-pool of stride 2 that leaves alone what is only one cell long, so that short clips pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C, T / 2, H / 2, W / 2)."""
        return F.max_pool3d(x, [min(2, cells) for cells in x.shape[2:]])


def init_convolutions(module: nn.Module, init: Init = "fan_out") -> None:
    """Draw all convolution weights anew.

    ``fan_out`` and ``fan_in``: normal with variance 2 / fan (He et al., "Delving Deep into Rectifiers", ICCV 2015).
    ``variance_scaling``: variance 1 / fan_in, normal truncated at two standard deviations, as TensorFlow's (SimCLR).
    """
    if init not in ("fan_out", "fan_in", "variance_scaling"):
        raise ValueError(f"init must be fan_out, fan_in or variance_scaling, got {init!r}")
    for part in module.modules():
        if not isinstance(part, (nn.Conv2d, nn.Conv3d)):
            continue
        if init == "variance_scaling":
            fan_in = part.weight[0].numel()
            std = math.sqrt(1.0 / fan_in) / 0.87962566103423978  # truncation shrinks the deviation by this factor
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.kaiming_normal_(part.weight, mode=init, nonlinearity="relu")
