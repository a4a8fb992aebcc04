"""Contrastive losses as functions of embeddings. Everything is computed in at least fp32, also under autocast."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["paper", "reference"]


def full_precision(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x_BD: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows divided by their L2 norm, which counts as ``eps`` if it is smaller; in at least fp32."""
    return F.normalize(full_precision(x_BD), dim=-1, eps=eps)


def nt_xent(
    z1_ND: Tensor,
    z2_ND: Tensor,
    temperature: float,
    *,
    columns: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    reduction: Reduction = "paper",
    hidden_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross-entropy of N pairs (Chen et al., ICML 2020, eq. 1).

    z1_ND, z2_ND: embeddings of the two views of this process's N samples. columns: the embeddings of all M samples of
    the global batch, gathered with gradient, of which this process owns rows offset ... offset + N - 1; None: this
    batch is the whole. Each of the 2 N rows is classified over the 2 M - 1 others. reduction: ``paper`` is the mean
    over the 2 N rows; ``reference`` sums the two views and is twice that. hidden_norm: divide by the L2 norm first.

    Returns the loss and the (N, M) similarities of view 1 to view 2 over the temperature; the pair of row i is column
    offset + i.
    """
    with torch.autocast(z1_ND.device.type, enabled=False):
        z1, z2 = full_precision(z1_ND), full_precision(z2_ND)
        all1, all2 = (z1, z2) if columns is None else (full_precision(columns[0]), full_precision(columns[1]))
        if hidden_norm:  # the reference clamps the squared norm at 1e-12
            z1, z2, all1, all2 = (unit(z, 1e-6) for z in (z1, z2, all1, all2))
        target = offset + torch.arange(len(z1), device=z1.device)
        own = F.one_hot(target, len(all1)).bool()
        logits_ab = z1 @ all2.T / temperature
        logits_ba = z2 @ all1.T / temperature
        logits_aa = (z1 @ all1.T / temperature).masked_fill(own, -torch.inf)
        logits_bb = (z2 @ all2.T / temperature).masked_fill(own, -torch.inf)
        loss1 = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), target)
        loss2 = F.cross_entropy(torch.cat([logits_ba, logits_bb], 1), target)
        loss = loss1 + loss2
        return (loss / 2 if reduction == "paper" else loss), logits_ab


def info_nce(
    q_ND: Tensor, k_ND: Tensor, negatives_DK: Tensor, temperature: float, *, weights_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE with one positive and K shared negatives per row (He et al., CVPR 2020, eq. 1).

    q_ND, k_ND: unit rows. negatives_DK: unit columns. weights_K: factors of the similarities to the negatives, inside
    the exponential. Returns the mean cross-entropy and the logits (N, 1 + K), the positive in column 0, already over
    the temperature.
    """
    with torch.autocast(q_ND.device.type, enabled=False):
        q, k, negatives = full_precision(q_ND), full_precision(k_ND), full_precision(negatives_DK)
        others = q @ negatives if weights_K is None else (q @ negatives) * weights_K
        logits = torch.cat([(q * k).sum(1, keepdim=True), others], 1) / temperature
        return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.int64)), logits


def accuracy(logits_NK: Tensor, target: Tensor | int) -> Tensor:
    """Share of rows whose largest logit is the target's; scalar without gradient."""
    return (logits_NK.detach().argmax(1) == target).float().mean()


def entropy(logits_NK: Tensor) -> Tensor:
    """Mean entropy, in nats, of the rows' softmax, with 1e-8 inside the logarithm; scalar without gradient."""
    p = logits_NK.detach().softmax(1)
    return -(p * (p + 1e-8).log()).sum(1).mean()
