"""S3D: Inception with separable space-time convolutions, as in torchvision (no gating).

Xie et al., "Rethinking Spatiotemporal Feature Learning: Speed-Accuracy Trade-offs in Video Classification", ECCV 2018
(arXiv 1712.04851). At width 1 the tensors have the names and shapes of torchvision's S3D without ``classifier``.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.ops import Conv3dNormActivation

from clipmill.models.backbones.parts import STAGES, HalvingPool, reductions_of, scaled, video_spec
from clipmill.models.encoder import Encoder

# Output channels of an Inception block: branch 0; branch 1 mid, out; branch 2 mid, out; branch 3.
MIXED_3 = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))
MIXED_4 = (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
)
MIXED_5 = ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))


class S3D(Encoder):
    """S3D over (B, C, T, H, W); features are the global average of the last map.

    Stages: stem = first convolution, res2 = second, res3, res4, res5 = the Inception blocks 3, 4 and 5, at the strides
    a ResNet has there.
    """

    stages = STAGES

    def __init__(self, width: float, channels: int, bn_momentum: float) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm3d, eps=1e-3, momentum=bn_momentum)
        first, second = scaled(64, width), scaled(192, width)
        dim = second

        def mixed(*branches: int) -> nn.Module:
            nonlocal dim
            outs = [scaled(branch, width) for branch in branches]
            block = SepInceptionBlock3D(dim, *outs, norm_layer=norm)
            dim = outs[0] + outs[2] + outs[4] + outs[5]
            return block

        stem = [TemporalSeparableConv(channels, first, 7, 2, 3, norm)]
        res2 = [
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            Conv3dNormActivation(first, first, kernel_size=1, norm_layer=norm),
            TemporalSeparableConv(first, second, 3, 1, 1, norm),
        ]
        res3 = [nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), *(mixed(*branches) for branches in MIXED_3)]
        res4 = [nn.MaxPool3d(3, 2, 1), *(mixed(*branches) for branches in MIXED_4)]
        res5 = [HalvingPool(), *(mixed(*branches) for branches in MIXED_5)]
        parts = (stem, res2, res3, res4, res5)
        self.features = nn.Sequential(*(module for part in parts for module in part))
        self.ends = [sum(len(part) for part in parts[: number + 1]) for number in range(len(parts))]
        self.dim = dim
        self.spec = video_spec(num_frames=64, size=224, channels=channels)
        self.reductions = reductions_of((2, 2, 2), (1, 1, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, T', H', W') of clips after ``stage``."""
        self.check(x)
        return self.features[: self.ends[self.depth(stage)]](x)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): the global average of res5."""
        return self.maps(x, "res5").mean((2, 3, 4))


def s3d(*, width: float = 1.0, channels: int = 3, bn_momentum: float = 0.1) -> Encoder:
    """S3D, D = 1024 at width 1.

    width: scales all channels. channels: of the input. bn_momentum: of the running statistics; torchvision has 0.001,
    which takes thousands of steps before evaluation mode is of any use.
    """
    return S3D(width, channels, bn_momentum)
