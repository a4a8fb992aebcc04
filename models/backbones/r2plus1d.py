"""R(2+1)D-18 in its three published forms, which do not share weights.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018 (arXiv 1711.11248):
a 3-D convolution becomes a 1x3x3 one, a normalisation and ReLU, and a 3x1x1 one.

- `r2plus1d_18`: torchvision's. Both convolutions of a block have the mid width of its first.
- `r2plus1d_18_vmz`: the Video Model Zoo's (Caffe2), used by XDC. Mid width per convolution.
- `r2plus1d_18_avid`: AVID's and CrissCross's. No mid width, the sum with the shortcut is normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.backbones.parts import reductions_of, scaled, stage_strides, video_spec
from clipmill.models.backbones.r3d import STRIDES, ClipOptions, Stride, VideoResNet, full_stem, video_resnet18
from clipmill.models.encoder import Encoder


def mid_width(channels_in: int, channels_out: int) -> int:
    """Mid channels that give a factorised 3x3x3 convolution the parameters of a full one.

    >>> mid_width(64, 64), mid_width(64, 128), mid_width(512, 512)
    (144, 230, 1152)
    """
    return 27 * channels_in * channels_out // (9 * channels_in + 3 * channels_out)


def factorised(channels_in: int, mid: int, channels_out: int, stride: Stride) -> nn.Sequential:
    """1x3x3 convolution to ``mid`` channels, normalisation, ReLU, 3x1x1 convolution."""
    t, h, w = stride
    return nn.Sequential(
        nn.Conv3d(channels_in, mid, (1, 3, 3), (1, h, w), (0, 1, 1), bias=False),
        nn.BatchNorm3d(mid),
        nn.ReLU(inplace=True),
        nn.Conv3d(mid, channels_out, (3, 1, 1), (t, 1, 1), (1, 0, 0), bias=False),
    )


def block_conv(channels_in: int, channels_out: int, stride: Stride, block_in: int) -> nn.Module:
    """Mid width from the block's own input and output (torchvision)."""
    return factorised(channels_in, mid_width(block_in, channels_out), channels_out, stride)


def own_conv(channels_in: int, channels_out: int, stride: Stride, block_in: int) -> nn.Module:
    """Mid width from this convolution's input and output (Video Model Zoo)."""
    return factorised(channels_in, mid_width(channels_in, channels_out), channels_out, stride)


def factorised_stem(channels: int, width: float) -> nn.Sequential:
    """1x7x7 convolution of stride 1x2x2 to 45 channels and 3x1x1 to 64, each with normalisation and ReLU."""
    mid, out = scaled(45, width), scaled(64, width)
    return nn.Sequential(
        nn.Conv3d(channels, mid, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(mid),
        nn.ReLU(inplace=True),
        nn.Conv3d(mid, out, (3, 1, 1), 1, (1, 0, 0), bias=False),
        nn.BatchNorm3d(out),
        nn.ReLU(inplace=True),
    )


def r2plus1d_18(**options: Unpack[ClipOptions]) -> Encoder:
    """R(2+1)D-18 with torchvision's mid widths, D = 512 at width 1; options: `ClipOptions`."""
    return video_resnet18(factorised_stem, [block_conv] * 4, **options)


def r2plus1d_18_vmz(**options: Unpack[ClipOptions]) -> Encoder:
    """R(2+1)D-18 as in the Video Model Zoo and XDC, D = 512 and 33,165,639 parameters at width 1.

    Mid width per convolution; batch normalisation with eps 1e-3 and (PyTorch's) momentum 0.9. Options: `ClipOptions`.
    """
    encoder = video_resnet18(factorised_stem, [own_conv] * 4, **options)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.eps, part.momentum = 1e-3, 0.9
    return encoder


class SumNormBlock(nn.Module):
    """Two factorised convolutions without mid width; normalisation and ReLU come after the sum."""

    def __init__(self, channels_in: int, channels: int, stride: Stride, side: bool) -> None:
        super().__init__()
        self.conv1 = factorised(channels_in, channels, channels, stride)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = factorised(channels, channels, channels, (1, 1, 1))
        self.downsample = nn.Conv3d(channels_in, channels, 1, stride, bias=False) if side else None
        self.norm = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, T, H, W) to (B, channels, T / stride, H / stride, W / stride)."""
        around = x if self.downsample is None else self.downsample(x)
        y = self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True))
        return F.relu(self.norm(y + around), inplace=True)


def r2plus1d_18_avid(
    *,
    width: float = 1.0,
    channels: int = 3,
    strides: Sequence[int] = STRIDES,
    temporal_strides: Sequence[int] = STRIDES,
) -> Encoder:
    """R(2+1)D-18 as in AVID and CrissCross, D = 512 and 15,379,136 parameters at width 1.

    Stem: a full 3x7x7 convolution and a 1x3x3 max-pool, stride 4 in space. Convolutions keep PyTorch's default
    initialisation. width: scales all channels. channels: of the input. strides, temporal_strides: of res2 to res5.
    """
    strides = stage_strides("strides", strides)
    temporal_strides = stage_strides("temporal_strides", temporal_strides)
    layers, channels_in = [], scaled(64, width)
    for number, (t, s) in enumerate(zip(temporal_strides, strides, strict=True)):
        out = scaled(64 << number, width)
        first = SumNormBlock(channels_in, out, (t, s, s), side=number > 0)
        layers.append(nn.Sequential(first, SumNormBlock(out, out, (1, 1, 1), side=False)))
        channels_in = out
    stem = nn.Sequential(*full_stem(channels, width), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
    spec = video_spec(num_frames=8, size=112, channels=channels)
    reductions = reductions_of((1, 4, 4), temporal_strides, strides, strides)
    return VideoResNet(stem, layers, dim=channels_in, spec=spec, reductions=reductions)
