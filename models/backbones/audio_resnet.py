"""ResNet over log-mel spectrograms (B, 1, mels, frames), the audio half of audio-visual methods.

The same network as `clipmill.models.backbones.resnet` with a stem of one channel, as XDC, AVID and CrissCross use it.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from clipmill.models.backbones.parts import reductions_of
from clipmill.models.backbones.resnet import BasicBlock, Trunk, TrunkOptions
from clipmill.models.encoder import Encoder, InputSpec

SPEC = InputSpec(modality="audio", channels=1, num_frames=201, size=80, mean=(0.0,), std=(1.0,))


class AudioResNet(Trunk):
    """A ResNet over (B, 1, mels, frames)."""

    def _reductions(self) -> dict[str, tuple[int, ...]]:
        return reductions_of((4, 4), self.strides, self.strides)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps (B, C, H, W) of spectrograms after ``stage``; H runs over mel bands, W over time."""
        self.check(x)
        return self.planes(x, stage, self.strides, self.dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D): the global average of res5."""
        return self.maps(x, "res5").mean((2, 3))


def audio_resnet18(**options: Unpack[TrunkOptions]) -> Encoder:
    """ResNet-18 over spectrograms, D = 512 and 11,170,240 parameters at width 1; options: `TrunkOptions`."""
    return AudioResNet(BasicBlock, (2, 2, 2, 2), SPEC, **options)
