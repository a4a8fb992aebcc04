"""ClipBatch: what a method receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBatch:
    """One batch on the device.

    video: {view: (B, C, T, H, W)} float. audio: {view: (B, S) waveform or (B, 1, mels, frames)} float. index: (B,)
    int64 record numbers. uid: (B,) int64 stable sample numbers (bit pattern of the unsigned uid). label: (B,) int64,
    -1 = none. start_s: {view: (B,)} float64 seconds. aux: {name: (B,)} float64, what the planner sent along.
    """

    video: Mapping[str, Tensor]
    audio: Mapping[str, Tensor]
    index: Tensor
    uid: Tensor
    label: Tensor
    start_s: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> ClipBatch:
        """The same batch on another device."""

        def move(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in group.items()}

        return ClipBatch(
            video=move(self.video),
            audio=move(self.audio),
            index=self.index.to(device),
            uid=self.uid.to(device),
            label=self.label.to(device),
            start_s=move(self.start_s),
            aux=move(self.aux),
        )
