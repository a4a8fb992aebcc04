"""Heads: the small networks between a backbone's pooled features and a loss, thrown away after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

Norm = Literal["none", "affine", "scale"]


def mlp(widths: Sequence[int], *, bias: bool = True, norm: Norm = "none", last_norm: Norm = "none") -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1] with ReLU between them; (B, widths[0]) -> (B, widths[-1]).

    norm: batch normalisation before every ReLU, ``affine`` with scale and shift. last_norm: after the last layer, which
    has no ReLU; ``scale`` has no shift.

    >>> [type(layer).__name__ for layer in mlp((8, 8, 4), norm="affine")]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for number, (width_in, width_out) in enumerate(pairwise(widths), 2):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        last = number == len(widths)
        layers += batch_norm(width_out, last_norm if last else norm)
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def batch_norm(width: int, norm: Norm) -> list[nn.Module]:
    """No layer, a batch normalisation, or one whose shift is fixed at 0 by not existing."""
    if norm == "none":
        return []
    layer = nn.BatchNorm1d(width)
    if norm == "scale":
        layer.register_parameter("bias", None)
    return [layer]


def simclr_head(dim: int, out_dim: int = 128, layers: int = 2) -> nn.Sequential:
    """The projection head g of SimCLR: (B, dim) -> (B, out_dim), not normalised.

    layers - 1 times [Linear(dim, dim), BN, ReLU], then Linear(dim, out_dim), BN without shift; no linear bias anywhere;
    kernels drawn from N(0, 0.01^2) (Chen et al., ICML 2020, reference implementation; the published formula has no
    last BN). The reference averages the population variance into its running variance, PyTorch the unbiased one,
    n / (n - 1) times as large; only the running statistics of a head that is thrown away differ by it.
    """
    if layers < 1:
        raise ValueError(f"a projection head needs at least 1 layer, got {layers}")
    head = mlp([dim] * layers + [out_dim], bias=False, norm="affine", last_norm="scale")
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return head
