"""C3D: eight 3x3x3 convolutions, here with batch normalisation and global pooling instead of three dense layers.

D. Tran, L. Bourdev, R. Fergus, L. Torresani, M. Paluri, "Learning Spatiotemporal Features with 3D Convolutional
Networks", ICCV 2015 (arXiv 1412.0767).
"""

from __future__ import annotations

from torch import Tensor, nn

from clipmill.models.backbones.parts import (
    STAGES,
    HalvingPool,
    init_convolutions,
    reductions_of,
    scaled,
    video_spec,
)
from clipmill.models.encoder import Encoder

LAYERS = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # output channels between the poolings


class C3D(Encoder):
    """C3D over (B, C, T, H, W); features are the global average of the last map.

    Stages: the groups of convolutions between the poolings, conv1 = stem to conv5 = res5. The first pooling keeps time.
    """

    stages = STAGES

    def __init__(self, width: float, channels: int, norm: bool) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        dim = channels
        for number, outs in enumerate(LAYERS):
            layers: list[nn.Module] = []
            if number == 1:
                layers.append(nn.MaxPool3d((1, 2, 2)))
            elif number > 1:
                layers.append(HalvingPool())
            for out in outs:
                out = scaled(out, width)
                layers.append(nn.Conv3d(dim, out, 3, padding=1, bias=not norm))
                layers += [nn.BatchNorm3d(out)] if norm else []
                layers.append(nn.ReLU(inplace=True))
                dim = out
            self.groups.append(nn.Sequential(*layers))
        init_convolutions(self)
        self.dim = dim
        self.spec = video_spec(num_frames=16, size=112, channels=channels)
        self.reductions = reductions_of((1, 1, 1), (1, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, T', H', W') of clips after ``stage``."""
        self.check(x)
        for group in self.groups[: self.depth(stage) + 1]:
            x = group(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): the global average of res5."""
        return self.maps(x, "res5").mean((2, 3, 4))


def c3d(*, width: float = 1.0, channels: int = 3, norm: bool = True) -> Encoder:
    """C3D, D = 512 at width 1.

    width: scales all channels. channels: of the input. norm: batch normalisation after every convolution, which the
    original has not.
    """
    return C3D(width, channels, norm)
