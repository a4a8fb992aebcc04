"""Frozen feature maps of image patches: what a tracker asks of an encoder."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.features import Compute, Precision

_DEFAULT_STAGE = "res5"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """Which feature maps a tracker sees, and how they are computed."""

    stage: str = ""
    """Stage of the encoder; default: res5 where there is one, else its last."""
    strides: tuple[int, int, int, int] = (1, 2, 1, 1)
    """Of res2 to res5 of ResNets over frames (stride 8 at res5); other encoders keep their own."""
    dilations: tuple[int, int, int, int] = (1, 1, 2, 4)
    """Of res2 to res5 of ResNets over frames; other encoders keep their own."""
    batch_size: int = 48
    """Patches per forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    precision: Precision = "fp32"
    """Precision of the network; fp16 and bf16 run under autocast."""

    def __post_init__(self) -> None:
        self.compute  # noqa: B018  (checks the numbers)

    @property
    def compute(self) -> Compute:
        """Device and precision."""
        return Compute(batch_size=self.batch_size, device=self.device, precision=self.precision)


class FrozenMaps:
    """Maps of patches by an encoder, which must be in eval mode and on the device of the options.

    stride: pixels of a patch per cell. about: what decides the maps, JSON-ready. Raises ValueError for an encoder that
    does not see in colour, a stage it does not have, and cells that are not square.
    """

    def __init__(self, encoder: Encoder, options: MapOptions) -> None:
        spec = encoder.spec
        if spec.modality != "video" or spec.channels != 3:
            raise ValueError(f"{type(encoder).__name__} does not see colour pictures; a tracker needs one that does")
        self.encoder, self.compute = encoder, options.compute
        self.stage = options.stage or (_DEFAULT_STAGE if _DEFAULT_STAGE in encoder.stages else encoder.stages[-1])
        depth = encoder.depth(self.stage)
        self._options: dict[str, Any] = {}
        height, width = encoder.reductions[self.stage][-2:]
        if "dilations" in inspect.signature(encoder.maps).parameters:
            self._options = {"strides": options.strides, "dilations": options.dilations}
            height = width = encoder.reductions[encoder.stages[0]][-1] * math.prod(options.strides[:depth])
        if height != width:
            raise ValueError(f"stage {self.stage} has {height} x {width} pixels per cell; a tracker needs square ones")
        self.stride = height
        self.about = {"stage": self.stage, "stride": self.stride, **self._options}
        self.device = self.compute.torch_device
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) * 255 for values in (spec.mean, spec.std)
        )

    @torch.no_grad()
    def __call__(self, patches_NSSC: np.ndarray) -> Tensor:
        """(N, C, h, w) float32 of patches (N, S, S, 3) uint8."""
        patches = torch.from_numpy(patches_NSSC)
        if self.device.type == "cuda":
            patches = patches.pin_memory()
        found = []
        for part in patches.split(self.compute.batch_size):
            x = part.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            x = ((x - self._mean) / self._std)[:, :, None]
            with self.compute.autocast():
                found.append(self.encoder.maps(x, self.stage, **self._options).float().mean(2))
        return torch.cat(found)
