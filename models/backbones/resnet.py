"""2-D ResNets that see every frame by itself and pool over time.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), with the stride of a
bottleneck in its 3x3 convolution. At width 1 the tensors have the names and shapes of torchvision's ResNets without
``fc``. Stage names are the detection literature's: res2 to res5 are torchvision's layer1 to layer4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.backbones.parts import (
    STAGES,
    Init,
    init_convolutions,
    reductions_of,
    scaled,
    stage_strides,
    stage_values,
    video_spec,
)
from clipmill.models.encoder import Encoder, InputSpec

Stem = Literal["7x7", "3x3"]
Pool = Literal["mean", "max"]
STRIDES = (1, 2, 2, 2)
DILATIONS = (1, 1, 1, 1)


def convolve(conv: nn.Conv2d, x: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """Apply the weights of ``conv`` at a stride and dilation of one's own; the size is kept at stride 1."""
    return F.conv2d(x, conv.weight, None, stride, dilation * (conv.kernel_size[0] // 2), dilation)


def shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """The 1x1 convolution beside a stage's first block."""
    conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


def carry(downsample: nn.Sequential | None, x: Tensor, stride: int) -> Tensor:
    """What goes around a block."""
    if downsample is None:
        return x
    conv, norm = downsample[0], downsample[1]
    assert isinstance(conv, nn.Conv2d)
    return norm(convolve(conv, x, stride))


def temporal_shift(x_NCHW: Tensor, frames: int, share: int) -> Tensor:
    """Give 1/share of the channels the next frame's values and the next 1/share the previous frame's; zeros beyond.

    x_NCHW: maps of whole clips, ``frames`` rows a clip. J. Lin et al., "TSM", ICCV 2019 (arXiv 1811.08383), whose
    released code this follows; it has no parameters.
    """
    x = x_NCHW.unflatten(0, (-1, frames))
    fold = x.shape[2] // share
    later = F.pad(x[:, 1:, :fold], (0, 0, 0, 0, 0, 0, 0, 1))
    earlier = F.pad(x[:, :-1, fold : 2 * fold], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat([later, earlier, x[:, :, 2 * fold :]], 2).flatten(0, 1)


Shift = tuple[int, int] | None  # frames per clip and share, of `temporal_shift` at the start of every residual branch


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ``dilation`` is that of the first, as in the released code of VFS."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels_in: int, planes: int, stride: int, downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor, stride: int, dilation: int, shift: Shift = None) -> Tensor:
        """(N, C, H, W) to (N, planes, H / stride, W / stride)."""
        y = x if shift is None else temporal_shift(x, *shift)
        y = F.relu(self.bn1(convolve(self.conv1, y, stride, dilation)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + carry(self.downsample, x, stride), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; stride and dilation are those of the 3x3."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels_in: int, planes: int, stride: int, downsample: nn.Sequential | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor, stride: int, dilation: int, shift: Shift = None) -> Tensor:
        """(N, C, H, W) to (N, 4 * planes, H / stride, W / stride)."""
        y = x if shift is None else temporal_shift(x, *shift)
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = F.relu(self.bn2(convolve(self.conv2, y, stride, dilation)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + carry(self.downsample, x, stride), inplace=True)


class TrunkOptions(TypedDict, total=False):
    """Options of all ResNets here.

    width: scales all channels. zero_init_residual: every block begins as the identity. init: see
    `clipmill.models.backbones.parts.init_convolutions`.
    """

    width: float
    zero_init_residual: bool
    init: Init


class FrameOptions(TrunkOptions, total=False):
    """Options of the ResNets over frames.

    channels: of the input. pool: over time. stem: ``7x7`` (stride 2, then max-pool) or ``3x3`` (stride 1, no max-pool)
    for pictures of about 32 pixels. strides, dilations: of res2 to res5; they never change the parameters. shift: 8
    makes it a TSM, where in every block 1/8 of the channels look a frame ahead and 1/8 a frame back; 0 = none.
    """

    channels: int
    pool: Pool
    stem: Stem
    strides: Sequence[int]
    dilations: Sequence[int]
    shift: int


class Trunk(Encoder):
    """Stem and four stages of residual blocks over pictures; subclasses say what a picture is."""

    stages = STAGES

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        spec: InputSpec,
        *,
        width: float = 1.0,
        stem: Stem = "7x7",
        strides: Sequence[int] = STRIDES,
        dilations: Sequence[int] = DILATIONS,
        zero_init_residual: bool = False,
        init: Init = "fan_out",
    ) -> None:
        super().__init__()
        if stem not in ("7x7", "3x3"):
            raise ValueError(f"stem must be 7x7 or 3x3, got {stem!r}")
        self.spec = spec
        self.small_stem = stem == "3x3"
        self.strides, self.dilations = stage_strides("strides", strides), stage_values("dilations", dilations)
        self.reductions = self._reductions()
        channels = scaled(64, width)
        kernel, stride = (3, 1) if self.small_stem else (7, 2)
        self.conv1 = nn.Conv2d(spec.channels, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        layers = []
        for number, (depth, stride) in enumerate(zip(depths, self.strides, strict=True)):
            planes = scaled(64 << number, width)
            out = planes * block.expansion
            # Whether there is a shortcut must not depend on the strides: they never change the parameters.
            side = shortcut(channels, out, stride) if number > 0 or channels != out else None
            first = block(channels, planes, stride, side)
            layers.append(nn.ModuleList([first, *(block(out, planes, 1, None) for _ in range(1, depth))]))
            channels = out
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.dim = channels
        init_convolutions(self, init)
        if zero_init_residual:
            for part in self.modules():
                if isinstance(part, BasicBlock):
                    nn.init.zeros_(part.bn2.weight)
                elif isinstance(part, Bottleneck):
                    nn.init.zeros_(part.bn3.weight)

    @abstractmethod
    def _reductions(self) -> dict[str, tuple[int, ...]]:
        """`reductions` from ``strides`` and ``small_stem``."""

    def planes(
        self, x_NCHW: Tensor, stage: str, strides: Sequence[int], dilations: Sequence[int], shift: Shift = None
    ) -> Tensor:
        """Maps of pictures after ``stage``.

        dilations: of each stage's 3x3 convolutions; its first block has half of it, so that the field of view grows
        as it would have with the stride that was taken out (torchvision's and VFS's convention).
        """
        last = self.depth(stage)
        x = F.relu(self.bn1(self.conv1(x_NCHW)), inplace=True)
        if not self.small_stem:
            x = F.max_pool2d(x, 3, 2, 1)
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        for layer, stride, dilation in zip(layers[:last], strides[:last], dilations[:last], strict=True):
            for number, block in enumerate(layer):
                at = (1, dilation) if number else (stride, max(dilation // 2, 1))
                x = block(x, *at, shift)
        return x


class FrameResNet(Trunk):
    """A ResNet over (B, C, T, H, W): every frame by itself, then mean or maximum over time."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        channels: int = 3,
        pool: Pool = "mean",
        stem: Stem = "7x7",
        strides: Sequence[int] = STRIDES,
        dilations: Sequence[int] = DILATIONS,
        shift: int = 0,
        **options: Unpack[TrunkOptions],
    ) -> None:
        if shift != 0 and shift < 2:
            raise ValueError(f"shift must be 0 or at least 2, got {shift}")
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be mean or max, got {pool!r}")
        spec = video_spec(num_frames=1, size=32 if stem == "3x3" else 224, channels=channels)
        super().__init__(block, depths, spec, stem=stem, strides=strides, dilations=dilations, **options)
        self.pool = pool
        self.shift = shift

    def _reductions(self) -> dict[str, tuple[int, ...]]:
        stem = 1 if self.small_stem else 4
        return reductions_of((1, stem, stem), (1, 1, 1, 1), self.strides, self.strides)

    def maps(
        self, x: Tensor, stage: str, strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None
    ) -> Tensor:
        """Maps (B, C, T, H, W) of clips after ``stage``.

        strides, dilations: of res2 to res5 for this call only, e.g. (1, 2, 1, 1) for res4 at stride 8; (1, 2, 1, 1)
        and (1, 1, 2, 4) for res5 at stride 8. They default to those the encoder was built with.
        """
        self.check(x)
        y = self.planes(
            x.transpose(1, 2).flatten(0, 1),
            stage,
            self.strides if strides is None else stage_strides("strides", strides),
            self.dilations if dilations is None else stage_values("dilations", dilations),
            (x.shape[2], self.shift) if self.shift else None,
        )
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): global average of each frame's res5, then mean or maximum over frames."""
        frames_BDT = self.maps(x, "res5").mean((3, 4))
        return frames_BDT.mean(2) if self.pool == "mean" else frames_BDT.amax(2)


def resnet18(**options: Unpack[FrameOptions]) -> Encoder:
    """ResNet-18 over frames, D = 512 at width 1; options: `FrameOptions`."""
    return FrameResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Unpack[FrameOptions]) -> Encoder:
    """ResNet-34 over frames, D = 512 at width 1; options: `FrameOptions`."""
    return FrameResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Unpack[FrameOptions]) -> Encoder:
    """ResNet-50 over frames, D = 2048 at width 1; options: `FrameOptions`."""
    return FrameResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Unpack[FrameOptions]) -> Encoder:
    """ResNet-101 over frames, D = 2048 at width 1; options: `FrameOptions`."""
    return FrameResNet(Bottleneck, (3, 4, 23, 3), **options)
