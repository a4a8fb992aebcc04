"""Encoders without anything learnt, to compare with: ``baseline:lab`` and ``baseline:logmel``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.models.colour import lab8_from_rgb
from clipmill.models.encoder import Encoder, InputSpec
from clipmill.pipeline.sound_spec import AudioSpec, LogMel
from clipmill.pipeline.views import View

BASELINE = "baseline:"


class LabPatches(Encoder):
    """The colours around every eighth pixel: mean Lab of 4 x 4 squares of 4 x 4 pixels, 48 numbers in about [-1, 1].

    Its one stage, ``patch``, has the grid of a convolution of stride 8 and kernel 16 with padding 4.
    """

    stride, square, squares = 8, 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.dim = 3 * self.squares**2
        self.stages = ("patch",)
        self.reductions = {"patch": (1, self.stride, self.stride)}
        self.spec = InputSpec(size=224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """(B, 48, T, H / 8, W / 8), rounded up, of RGB in [0, 1] (B, 3, T, H, W)."""
        self.check(x)
        self.depth(stage)
        lab = (lab8_from_rgb(x.transpose(1, 2).flatten(0, 1)) - 128) / 128
        height, width = lab.shape[2:]
        side, step = self.square * self.squares, self.stride
        rows, columns = -(-height // step), -(-width // step)
        before = (side - step) // 2
        after = (columns - 1) * step + side - before - width, (rows - 1) * step + side - before - height
        means = F.avg_pool2d(F.pad(lab, (before, after[0], before, after[1]), "replicate"), self.square)
        patches = F.unfold(means, self.squares, stride=step // self.square).unflatten(2, (rows, columns))
        return patches.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 48): the mean patch."""
        return self.maps(x, "patch").mean((2, 3, 4))


class LogMelBands(Encoder):
    """A log-mel spectrogram itself: its one stage, ``bands``, has a channel per mel band and the columns of the input.

    The pooled vector is every band's mean and standard deviation over time, D = 2 * mels. Front end of CrissCross.
    """

    def __init__(self) -> None:
        super().__init__()
        mel = LogMel(power_floor=2.2e-16, mean=-5.3688107, std=4.410007)
        self.dim, self.stages, self.reductions = 2 * mel.mels, ("bands",), {"bands": (mel.mels, 1)}
        self.audio_view = View(name="window", modality="audio", duration_s=1.0, augment=AudioSpec(logmel=mel))
        columns = mel.frames(mel.hz)
        self.spec = InputSpec(
            modality="audio", channels=1, num_frames=columns, size=mel.mels, mean=(mel.mean,), std=(mel.std,)
        )

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """(B, mels, 1, frames) of spectrograms (B, 1, mels, frames)."""
        self.check(x)
        self.depth(stage)
        return x.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2 * mels): mean and standard deviation of every band."""
        bands = self.maps(x, "bands")[:, :, 0]
        return torch.cat([bands.mean(2), bands.std(2, correction=0)], 1)


_BASELINES = {"lab": LabPatches, "logmel": LogMelBands}


def baseline(name: str) -> Encoder:
    """A baseline by what follows ``baseline:`` on the command line."""
    if name not in _BASELINES:
        raise ValueError(
            f"unknown baseline {name!r}; there is {BASELINE}lab, the colours of raw pixels, and {BASELINE}logmel, "
            "the spectrogram of raw sound"
        )
    return _BASELINES[name]()
