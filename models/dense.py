"""Contrast between places of two pictures: their correspondence, the head over places, and an InfoNCE in little memory.

X. Wang, R. Zhang, C. Shen, T. Kong, L. Li, "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR
2021, arXiv 2011.09157. A map is (B, C, P) here: P places in the order row * width + column.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.losses import full_precision, unit

CHUNK_BYTES = 64 << 20


class DenseOutput(NamedTuple):
    """What `DenseNeck` says of B maps of P places: one (B, D), places (B, P, D), mean (B, D), all unit vectors."""

    one: Tensor
    places: Tensor
    mean: Tensor


class DenseNeck(nn.Module):
    """Two heads side by side over a map (B, C, P): of its mean, and of every place.

    Each is [C -> hidden, ReLU, hidden -> D] with biases and without batch normalisation. The first is initialised as
    He et al. (fan-in, no bias); the released code leaves 1x1 convolutions, the second, at torch's default.
    """

    def __init__(self, channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))
        self.mlp2 = nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv1d(hidden, dim, 1))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, map_BCP: Tensor) -> DenseOutput:
        """Unit vectors; ``mean`` is that of the places before they are normalised."""
        places = full_precision(self.mlp2(map_BCP))
        return DenseOutput(
            one=unit(self.mlp(map_BCP.mean(2))), places=unit(places.transpose(1, 2)), mean=unit(places.mean(2))
        )


@torch.no_grad()
def correspondence(query_BCP: Tensor, key_BCP: Tensor) -> Tensor:
    """For every query place the key place with the most similar backbone feature (cosine), (B, P) int64."""
    with torch.autocast(query_BCP.device.type, enabled=False):
        query, key = (F.normalize(full_precision(map_BCP), dim=1) for map_BCP in (query_BCP, key_BCP))
        return (query.transpose(1, 2) @ key).argmax(2)


def matched(places_BPD: Tensor, match_BP: Tensor) -> Tensor:
    """The rows of ``places_BPD`` that ``match_BP`` names, (B, P, D)."""
    return places_BPD.gather(1, match_BP[..., None].expand(-1, -1, places_BPD.shape[2]))


# --- InfoNCE in little memory -------------------------------------------------------------------------------


def bounded_info_nce(
    q_ND: Tensor, k_ND: Tensor, negatives_DK: Tensor, temperature: float, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """`clipmill.models.losses.info_nce` without its (N, 1 + K) logits; returns the loss, and which rows are right.

    Keys and negatives are constants, so the gradient of q is known as soon as a chunk of rows has its softmax: it is
    computed with the loss and only (N, D) numbers are kept for the backward pass. A chunk of logits takes at most
    ``chunk_bytes`` (one row at least), and there are at most two of that size at a time.

    The second result is (N,) bool: the positive is nearer than all negatives. Not differentiable twice.
    """
    with torch.autocast(q_ND.device.type, enabled=False):
        q, k, negatives = full_precision(q_ND), full_precision(k_ND), full_precision(negatives_DK)
        row_bytes = q.element_size() * (1 + negatives.shape[1])
        rows = max(1, chunk_bytes // row_bytes)
        loss, right = cast(tuple[Tensor, Tensor], _Bounded.apply(q, k.detach(), negatives.detach(), temperature, rows))
        return loss, right


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, negatives: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(q) if wanted else None
        total, right = q.new_zeros(()), torch.empty(len(q), dtype=torch.bool, device=q.device)
        logits = q.new_empty(min(rows, len(q)), negatives.shape[1])
        for start in range(0, len(q), rows):
            part, own = q[start : start + rows], k[start : start + rows]
            chunk = torch.mm(part, negatives, out=logits[: len(part)]).div_(temperature)
            positive = (part * own).sum(1) / temperature
            right[start : start + rows] = positive > chunk.amax(1)
            norm = torch.logaddexp(positive, chunk.logsumexp(1))
            total += (norm - positive).sum()
            if grad is not None:  # (softmax - target) @ [positive; negatives] / temperature
                p = chunk.sub_(norm[:, None]).exp_()
                pull = ((positive - norm).exp() - 1)[:, None] * own
                grad[start : start + rows] = torch.addmm(pull, p, negatives.T).div_(temperature * len(q))
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(right)
        return total / len(q), right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None
