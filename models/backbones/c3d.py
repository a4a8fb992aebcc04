"""C3D: eight 3x3x3 convolutions, here with batch normalisation and global pooling instead of three dense layers.

D. Tran, L. Bourdev, R. Fergus, L. Torresani, M. Paluri, "Learning Spatiotemporal Features with 3D Convolutional
Networks", ICCV 2015 (arXiv 1412.0767).
"""

from __future__ import annotations

from torch import nn

from clipmill.models.backbones.parts import BlockNet, HalvingPool, init_convolutions, reductions_of, scaled, video_spec
from clipmill.models.encoder import Encoder

LAYERS = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # output channels between the poolings


def c3d(*, width: float = 1.0, channels: int = 3, norm: bool = True) -> Encoder:
    """C3D, D = 512 at width 1.

    Stages: the groups of convolutions between the poolings, conv1 = stem to conv5 = res5. The first pooling keeps time.
    width: scales all channels. channels: of the input. norm: batch normalisation after every convolution, which the
    original has not.
    """
    blocks, dim = nn.ModuleList(), channels
    poolings = ([], [nn.MaxPool3d((1, 2, 2))], [HalvingPool()], [HalvingPool()], [HalvingPool()])
    for pooling, outs in zip(poolings, LAYERS, strict=True):
        layers: list[nn.Module] = [*pooling]
        for out in (scaled(out, width) for out in outs):
            layers += [nn.Conv3d(dim, out, 3, padding=1, bias=not norm), *([nn.BatchNorm3d(out)] if norm else [])]
            layers.append(nn.ReLU(inplace=True))
            dim = out
        blocks.append(nn.Sequential(*layers))
    init_convolutions(blocks)
    reductions = reductions_of((1, 1, 1), (1, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2))
    return BlockNet(blocks, dim, video_spec(num_frames=16, size=112, channels=channels), reductions)
