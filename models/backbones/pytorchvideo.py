"""PyTorchVideo's networks behind the encoder protocol; needs ``pip install 'clipmill[pytorchvideo]'``.

Only ``pytorchvideo.models`` is used (its transforms do not import with current torchvision), and only when one of
these is built. Tensors have the names of PyTorchVideo's model zoo without the classifier. Options of all: width scales
all channels; channels: of the input.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from clipmill.models.backbones.parts import BlockNet, reductions_of, scaled, video_spec
from clipmill.models.encoder import Encoder

SPATIAL = (1, 2, 2, 2)
FAST_PER_SLOW = 4  # frames


def _models(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            # fvcore, which pytorchvideo imports, still compiles a function with the deprecated torch.jit.script.
            warnings.simplefilter("ignore", DeprecationWarning)
            return import_module(f"pytorchvideo.models.{name}")
    except ImportError as error:
        raise ValueError(
            f"this backbone needs PyTorchVideo, which does not import here ({error}): "
            "run `pip install 'clipmill[pytorchvideo]'`"
        ) from error


class SlowFast(BlockNet):
    """Two pathways, made from one clip: all frames (fast), and every fourth (slow).

    `maps` are those of the slow pathway, with what the fast one has added. Features: slow, then fast.
    """

    def pathways(self, x: Tensor, stage: str) -> list[Tensor]:
        """Maps of the slow and the fast pathway after ``stage``."""
        self.check(x)
        num_frames = x.shape[2]
        num_slow = -(-num_frames // FAST_PER_SLOW)
        # evenly from the first to the last frame, as PyTorchVideo packs its pathways
        picks = [i * (num_frames - 1) // max(num_slow - 1, 1) for i in range(num_slow)]
        paths = [x[:, :, torch.tensor(picks, device=x.device)], x]
        for block in self.blocks[: self.depth(stage) + 1]:
            paths = block(paths)
        return paths

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, T', H', W') of the slow pathway after ``stage``."""
        return self.pathways(x, stage)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): the global averages of both pathways' res5."""
        return torch.cat([path.mean((2, 3, 4)) for path in self.pathways(x, "res5")], 1)


def slow_r50(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """The slow pathway of SlowFast, ResNet-50 (Feichtenhofer et al., ICCV 2019), D = 2048 at width 1."""
    stem = scaled(64, width)
    net = _models("resnet").create_resnet(
        input_channel=channels, stem_dim_out=stem, stem_conv_kernel_size=(1, 7, 7), head=None
    )
    spec = video_spec(num_frames=8, stride=8, size=224, channels=channels)
    return BlockNet(net.blocks[:5], 32 * stem, spec, reductions_of((1, 4, 4), (1, 1, 1, 1), SPATIAL, SPATIAL))


def csn_r101(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """Channel-separated ResNet-101, ir-CSN (Tran et al., ICCV 2019), D = 2048 at width 1."""
    stem = scaled(64, width)
    net = _models("csn").create_csn(
        input_channel=channels, model_depth=101, stem_dim_out=stem, stem_pool=nn.MaxPool3d, model_num_class=1
    )
    spec = video_spec(num_frames=32, stride=2, size=224, channels=channels)
    return BlockNet(net.blocks[:5], 32 * stem, spec, reductions_of((1, 4, 4), SPATIAL, SPATIAL, SPATIAL))


def r2plus1d_r50(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """R(2+1)D with the bottlenecks of a ResNet-50, D = 2048 at width 1."""
    stem = scaled(64, width)
    net = _models("r2plus1d").create_r2plus1d(input_channel=channels, stem_dim_out=stem, model_num_class=1)
    spec = video_spec(num_frames=16, stride=4, size=224, channels=channels)
    halves = (2, 2, 2, 2)
    return BlockNet(net.blocks[:5], 32 * stem, spec, reductions_of((1, 2, 2), (1, 1, 2, 2), halves, halves))


def _x3d(num_frames: int, stride: int, size: int, width: float, channels: int) -> Encoder:
    dim = scaled(2048, width)
    net = _models("x3d").create_x3d(
        input_channel=channels,
        input_clip_length=num_frames,
        input_crop_size=size,
        model_num_class=1,
        dropout_rate=0.0,
        width_factor=2.0 * width,
        inner_act=nn.SiLU,  # the same as its own Swish, whose backward uses a deprecated attribute
        head_dim_out=dim,
        head_activation=None,
        head_output_with_global_average=False,
    )
    head = net.blocks[5]  # 1x1x1 convolution, average, 1x1x1 convolution, ReLU, classifier
    head.proj = nn.Identity()
    head.pool.pool = nn.AdaptiveAvgPool3d(1)  # instead of a window that fits one input size
    spec = video_spec(num_frames=num_frames, stride=stride, size=size, channels=channels)
    halves = (2, 2, 2, 2)
    return BlockNet(net.blocks, dim, spec, reductions_of((1, 2, 2), (1, 1, 1, 1), halves, halves))


def x3d_s(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """X3D-S (Feichtenhofer, CVPR 2020), 13 frames of 160 pixels, D = 2048 at width 1."""
    return _x3d(13, 6, 160, width, channels)


def x3d_m(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """X3D-M (Feichtenhofer, CVPR 2020): X3D-S given 16 frames of 224 pixels, D = 2048 at width 1."""
    return _x3d(16, 5, 224, width, channels)


def slowfast_r50(*, width: float = 1.0, channels: int = 3) -> Encoder:
    """SlowFast 8x8, ResNet-50 (Feichtenhofer et al., ICCV 2019), D = 2304 at width 1."""
    stem = scaled(64, width)
    net = _models("slowfast").create_slowfast(
        input_channels=(channels, channels), stem_dim_outs=(stem, stem // 8), head=None
    )
    spec = video_spec(num_frames=32, stride=2, size=224, channels=channels)
    reductions = reductions_of((FAST_PER_SLOW, 4, 4), (1, 1, 1, 1), SPATIAL, SPATIAL)
    return SlowFast(net.blocks[:5], 36 * stem, spec, reductions)
