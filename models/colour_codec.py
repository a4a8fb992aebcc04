"""The colour auto-encoder of UVC and ContrastCorr: Lab pictures to 256 numbers per 8 x 8 pixels, and back."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from clipmill.models.backbones.parts import scaled
from clipmill.models.correspondence import lab_distance

Step = int | Literal["pool", "double"]


class ColourCodec(nn.Module):
    """encode: Lab in [-1, 1] (B, 3, 8h, 8w) to features (B, 256 * width, h, w); decode: the way back.

    At width 1 621,132 and 620,867 weights. No normalisation layers, so it is the same in training and evaluation.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        c = [scaled(64 << n, width) for n in range(3)]
        encoder = _convolutions((3, c[0], c[0], "pool", c[1], c[1], "pool", c[2], "pool"))
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), *encoder, nn.Conv2d(c[2], c[2], 1), nn.ReLU())
        decoder = _convolutions((c[2], c[1], "double", c[1], c[0], "double", c[0], 3))[:-1]  # no ReLU after the last
        first = (nn.Upsample(scale_factor=2), nn.Conv2d(c[2], c[2], 1), nn.ReLU())
        self.decoder = nn.Sequential(*first, *decoder, nn.Tanh())
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # without normalisation, PyTorch's own start lets the signal die out
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    def encode(self, lab: Tensor) -> Tensor:
        """Features at stride 8."""
        return self.encoder(lab)

    def decode(self, features: Tensor) -> Tensor:
        """Lab in [-1, 1], eight times as large."""
        return self.decoder(features)


def _convolutions(steps: tuple[Step, ...]) -> list[nn.Module]:
    """3x3 convolutions with mirrored borders and ReLU from width to width, with poolings and doublings between."""
    layers: list[nn.Module] = []
    widths = [step for step in steps if isinstance(step, int)]
    pairs = iter(pairwise(widths))
    for step in steps[1:]:
        if step == "pool":
            layers.append(nn.MaxPool2d(2))
        elif step == "double":
            layers.append(nn.Upsample(scale_factor=2))
        else:
            layers += [nn.Conv2d(*next(pairs), 3, padding=1, padding_mode="reflect"), nn.ReLU()]
    return layers


@torch.enable_grad()
def learn_colours(codec: ColourCodec, lab8_N3HW: Tensor, *, steps: int, batch_size: int, lr: float) -> float:
    """Train a codec to reproduce 8-bit Lab pictures and freeze it; returns the last batch's `lab_distance`.

    lab8_N3HW: uint8 on any device. Batches are drawn from torch's generator; Adam with a cosine to 0.
    """
    like = next(codec.parameters())
    codec.requires_grad_(True)
    optimizer = torch.optim.Adam(codec.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = float("nan")
    for _ in range(steps):
        rows = torch.randint(len(lab8_N3HW), (batch_size,))
        lab = unit_lab(lab8_N3HW[rows].to(like.device)).to(like.dtype)
        loss = lab_distance(codec.decode(codec.encode(lab)), lab).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found = float(loss.detach())
    optimizer.zero_grad(set_to_none=True)
    codec.requires_grad_(False)
    return found


def unit_lab(lab8: Tensor) -> Tensor:
    """8-bit Lab as numbers around 0: (v - 128) / 128 in float32."""
    return (lab8.float() - 128) / 128
