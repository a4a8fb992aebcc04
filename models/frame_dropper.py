"""The generator of VideoMoCo: a network that scores the frames of a clip, and the replacement of the lowest-scoring.

T. Pan et al., "VideoMoCo", CVPR 2021, arXiv 2103.05905, as in the released code: not a ConvLSTM but a 2-D network over
the frames stacked as channels, and an LSTM that reads its channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DILATIONS = (6, 12, 18)


class FrameScorer(nn.Module):
    """Clips (B, C, T, side, side) to scores (B, num_frames) that sum to 1.

    channels: C * T, stacked colour by colour. side: of the clips in pixels, fixed by the LSTM's input. hidden: twice
    the LSTM's width in each direction.
    """

    def __init__(self, channels: int, num_frames: int, side: int, hidden: int = 128) -> None:
        super().__init__()
        pooled = pooled_side(side)
        if pooled < 1:
            raise ValueError(f"clips of {side} pixels are too small to score their frames; use 11 or more")
        self.side = side
        self.dilated = nn.Conv2d(channels, channels, 3, padding=1, dilation=2, bias=False)
        self.dilated_norm = nn.BatchNorm2d(channels, eps=1e-3)
        self.whole = nn.Conv2d(channels, channels, 1)
        self.point = nn.Conv2d(channels, channels, 1)
        self.atrous = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in _DILATIONS)
        self.project = nn.Conv2d(channels * (2 + len(_DILATIONS)), channels, 1)
        self.narrow = nn.Sequential(nn.Conv2d(channels, num_frames, 3, padding=1), nn.BatchNorm2d(num_frames))
        self.repeated = nn.Sequential(nn.Conv2d(num_frames, num_frames, 3, padding=1), nn.BatchNorm2d(num_frames))
        self.lstm = nn.LSTM(pooled**2, hidden // 2, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, num_frames)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of clips (B, C, T, side, side), or of their stacked frames (B, C * T, side, side)."""
        x = x.flatten(1, -3)
        if x.shape[-2:] != (self.side, self.side):
            raise ValueError(f"frames are scored at {self.side} x {self.side} pixels, got {tuple(x.shape[-2:])}")
        for _ in range(3):  # the same weights three times, each a pixel narrower
            x = F.max_pool2d(F.relu(self.dilated_norm(self.dilated(x))), 2, stride=1, padding=1)
        everywhere = self.whole(x.mean((2, 3), keepdim=True)).expand(x.shape)
        x = self.project(torch.cat([everywhere, self.point(x), *(conv(x) for conv in self.atrous)], 1))
        x = F.relu(self.narrow(x))
        for _ in range(3):  # the same weights six times
            x = F.relu(self.repeated(F.relu(self.repeated(x))))
            x = F.avg_pool2d(x, 2)
        states, _ = self.lstm(x.flatten(2))  # a sequence of channels
        return self.score(states[:, -1]).softmax(1)


def pooled_side(side: int) -> int:
    """Side of the map that the LSTM reads, for clips of ``side`` pixels.

    >>> pooled_side(112), pooled_side(19)
    (13, 2)
    """
    side -= 3
    for _ in range(3):
        side //= 2
    return side


def drop_frames(x_BCTHW: Tensor, scores_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Replace the ``count`` lowest-scoring frames of every clip by their mean over channels and pixels.

    Returns the clips and (B, T) bool, which frames were replaced. The gradient of a score is the sum of its frame's
    gradient, replaced or not (straight-through); the clips get none.
    """
    clips, dropped = cast(tuple[Tensor, Tensor], _Drop.apply(x_BCTHW, scores_BT, count))
    return clips, dropped


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        lowest = scores.topk(count, dim=1, largest=False).indices
        dropped = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
        ctx.mark_non_differentiable(dropped)
        ctx.kind = scores.dtype
        mean = x.mean((1, 3, 4), keepdim=True)
        return torch.where(dropped[:, None, :, None, None], mean, x), dropped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, grads[0].sum((1, 3, 4)).to(ctx.kind), None
