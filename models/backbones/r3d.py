"""3-D ResNets of 18 layers: R3D and MC3, and the frame they share with R(2+1)D.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018 (arXiv 1711.11248). At
width 1 the tensors have the names and shapes of torchvision's video ResNets without ``fc``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.backbones.parts import STAGES, init_convolutions, reductions_of, scaled, stage_strides, video_spec
from clipmill.models.encoder import Encoder, InputSpec

Stride = tuple[int, int, int]
STRIDES = (1, 2, 2, 2)


class VideoOptions(TypedDict, total=False):
    """Options of the 18-layer video ResNets.

    width: scales all channels. channels: of the input. strides: of res2 to res5 in space; they never change the
    parameters. zero_init_residual: every block begins as the identity.
    """

    width: float
    channels: int
    strides: Sequence[int]
    zero_init_residual: bool


class ClipOptions(VideoOptions, total=False):
    """`VideoOptions`, and temporal_strides: of res2 to res5 in time."""

    temporal_strides: Sequence[int]


class ConvBuilder(Protocol):
    """Builds the spatiotemporal convolution of a block."""

    def __call__(self, channels_in: int, channels_out: int, stride: Stride, block_in: int) -> nn.Module:
        """A module (B, channels_in, T, H, W) to (B, channels_out, ...); ``block_in``: channels its block began with."""
        ...


class StemBuilder(Protocol):
    """Builds what comes before res2: stride 2 in space, none in time."""

    def __call__(self, channels: int, width: float) -> nn.Sequential:
        """A module (B, channels, T, H, W) to (B, 64 * width, T, H / 2, W / 2)."""
        ...


class BasicBlock(nn.Module):
    """Two spatiotemporal convolutions and a shortcut, with torchvision's tensor names."""

    def __init__(self, conv: ConvBuilder, channels_in: int, channels: int, stride: Stride, side: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            conv(channels_in, channels, stride, channels_in), nn.BatchNorm3d(channels), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(conv(channels, channels, (1, 1, 1), channels_in), nn.BatchNorm3d(channels))
        self.downsample = None
        if side:
            shortcut = nn.Conv3d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, T, H, W) to (B, channels, T / stride, H / stride, W / stride)."""
        around = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + around, inplace=True)


class VideoResNet(Encoder):
    """A stem and four stages over (B, C, T, H, W); features are the global average of the last."""

    stages = STAGES

    def __init__(
        self,
        stem: nn.Sequential,
        layers: Sequence[nn.Sequential],
        dim: int,
        spec: InputSpec,
        reductions: dict[str, tuple[int, ...]],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.dim, self.spec, self.reductions = dim, spec, reductions

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, T', H', W') of clips after ``stage``."""
        self.check(x)
        for part in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4)[: self.depth(stage) + 1]:
            x = part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): the global average of res5."""
        return self.maps(x, "res5").mean((2, 3, 4))


def video_resnet18(
    stem: StemBuilder,
    convs: Sequence[ConvBuilder],
    *,
    width: float = 1.0,
    channels: int = 3,
    strides: Sequence[int] = STRIDES,
    temporal_strides: Sequence[int] = STRIDES,
    zero_init_residual: bool = False,
) -> VideoResNet:
    """Four stages of two basic blocks on top of a stem; ``convs``: the convolution of each stage."""
    strides = stage_strides("strides", strides)
    temporal_strides = stage_strides("temporal_strides", temporal_strides)
    layers, channels_in = [], scaled(64, width)
    for number, (conv, t, s) in enumerate(zip(convs, temporal_strides, strides, strict=True)):
        out = scaled(64 << number, width)
        # Whether there is a shortcut must not depend on the strides: they never change the parameters.
        first = BasicBlock(conv, channels_in, out, (t, s, s), side=number > 0)
        layers.append(nn.Sequential(first, BasicBlock(conv, out, out, (1, 1, 1), side=False)))
        channels_in = out
    encoder = VideoResNet(
        stem(channels, width),
        layers,
        dim=channels_in,
        spec=video_spec(num_frames=16, size=112, channels=channels),
        reductions=reductions_of((1, 2, 2), temporal_strides, strides, strides),
    )
    init_convolutions(encoder)
    if zero_init_residual:
        for part in encoder.modules():
            if isinstance(part, BasicBlock):
                last = part.conv2[1]
                assert isinstance(last, nn.BatchNorm3d)
                nn.init.zeros_(last.weight)
    return encoder


def full_stem(channels: int, width: float) -> nn.Sequential:
    """3x7x7 convolution of stride 1x2x2, normalisation, ReLU."""
    out = scaled(64, width)
    conv = nn.Conv3d(channels, out, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(out), nn.ReLU(inplace=True))


def full_conv(channels_in: int, channels_out: int, stride: Stride, block_in: int) -> nn.Module:
    """3x3x3 convolution."""
    return nn.Conv3d(channels_in, channels_out, 3, stride, 1, bias=False)


def frame_conv(channels_in: int, channels_out: int, stride: Stride, block_in: int) -> nn.Module:
    """1x3x3 convolution: every frame by itself."""
    return nn.Conv3d(channels_in, channels_out, (1, 3, 3), stride, (0, 1, 1), bias=False)


def r3d_18(**options: Unpack[ClipOptions]) -> Encoder:
    """R3D-18: 3x3x3 convolutions in all blocks, D = 512 at width 1; options: `ClipOptions`."""
    return video_resnet18(full_stem, [full_conv] * 4, **options)


def mc3_18(**options: Unpack[VideoOptions]) -> Encoder:
    """MC3-18: 3x3x3 convolutions in stem and res2, per-frame ones above, D = 512 at width 1; options: `VideoOptions`.

    Time keeps its length: no stage has a temporal stride.
    """
    return video_resnet18(full_stem, [full_conv, *[frame_conv] * 3], temporal_strides=(1, 1, 1, 1), **options)
