"""Harder negatives: weights that favour those near the anchor, and mixes of the nearest ones.

J. Robinson, C.-Y. Chuang, S. Sra, S. Jegelka, "Contrastive Learning with Hard Negative Samples", ICLR 2021, arXiv
2010.04592 (HCL; with beta = 0 the debiased loss of C.-Y. Chuang et al., NeurIPS 2020); Y. Kalantidis, M. B. Sariyildiz,
N. Pion, P. Weinzaepfel, D. Larlus, "Hard Negative Mixing for Contrastive Learning", NeurIPS 2020, arXiv 2010.01028
(MoCHi). Functions of logits and embeddings: they serve the negatives of a batch as well as those of a queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipmill.models.losses import full_precision, unit

# --- weights: HCL -------------------------------------------------------------------------------------------


def pair_logits(
    u1_ND: Tensor,
    u2_ND: Tensor,
    temperature: float,
    *,
    columns: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Similarities over the temperature of 2 N anchors, view 1 then view 2: to their pair, and to all others.

    u1_ND, u2_ND: unit embeddings of this process's N samples. columns, offset: as in `clipmill.models.losses.nt_xent`,
    of M samples. Returns (2 N,) and (2 N, 2 M - 2); columns are in the order [view 1 | view 2] without the anchor and
    its pair.
    """
    anchors = torch.cat([u1_ND, u2_ND])
    every = anchors if columns is None else torch.cat(columns)
    count, total = len(u1_ND), len(every) // 2
    logits = anchors @ every.T / temperature
    own = offset + torch.arange(count, device=logits.device)
    pair = torch.cat([own + total, own])
    left_out = own.repeat(2)[:, None]  # the smaller of the two columns that are no negatives; the other is M further
    others = torch.arange(2 * total - 2, device=logits.device).expand(2 * count, -1)
    others = others + (others >= left_out)
    others = others + (others >= left_out + total)
    return logits.gather(1, pair[:, None])[:, 0], logits.gather(1, others)


def log_reweighted(negatives_NK: Tensor, beta: float | Tensor) -> Tensor:
    """log R, (N,): R = sum_j w_j n_j / mean_j w_j with n = exp(logit) and w = n ** beta (HCL, section 3).

    K times an importance-weighted mean of n. beta = 0 is their sum. Gradients flow through the weights.
    """
    heavier, weights = ((1 + beta) * negatives_NK).logsumexp(1), (beta * negatives_NK).logsumexp(1)
    return heavier - weights + math.log(negatives_NK.shape[1])


def log_debiased(
    positive_N: Tensor, log_r_N: Tensor, count: int, temperature: float, tau_plus: float
) -> tuple[Tensor, Tensor]:
    """log G, (N,), and where G is at its floor: G = max((R - tau+ K p) / (1 - tau+), K exp(-1 / t)).

    The share tau+ of the negatives is taken to be of the anchor's own class, with the similarity of its pair, p =
    exp(positive). The floor is what K negatives at least amount to; there the gradient of G is 0.
    """
    log_k = math.log(count)
    shift = torch.maximum(log_r_N, positive_N + log_k).detach()  # keeps both exponentials at or below 1
    rest = (log_r_N - shift).exp() - tau_plus * (positive_N + log_k - shift).exp()
    floor = log_k - 1 / temperature
    at_floor = rest <= (1 - tau_plus) * (floor - shift).exp()
    log_g = shift + rest.masked_fill(at_floor, 1.0).log() - math.log1p(-tau_plus)
    return log_g.masked_fill(at_floor, floor), at_floor


def hard_nce(
    positive_N: Tensor,
    negatives_NK: Tensor,
    temperature: float,
    *,
    beta: float | Tensor = 1.0,
    tau_plus: float = 0.1,
    easy: bool = False,
) -> tuple[Tensor, Tensor]:
    """-log(p / (p + G)) of N anchors with K negatives each, (N,), and where the floor of G is active, (N,) bool.

    positive_N, negatives_NK: similarities of unit vectors over the temperature. easy: G is the plain sum, neither
    weighted nor debiased (the released code's estimator of that name). beta = tau+ = 0 is InfoNCE.
    """
    with torch.autocast(positive_N.device.type, enabled=False):
        positive, negatives = full_precision(positive_N), full_precision(negatives_NK)
        if easy:
            log_g, at_floor = negatives.logsumexp(1), torch.zeros_like(positive, dtype=torch.bool)
        else:
            log_r = log_reweighted(negatives, beta)
            log_g, at_floor = log_debiased(positive, log_r, negatives.shape[1], temperature, tau_plus)
        return torch.logaddexp(positive, log_g) - positive, at_floor


# --- mixes: MoCHi -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixes:
    """What is drawn for N queries: places in the hard set, and weights.

    first, second: (N, s) members of a mix of two negatives. alpha: (N, s) weight of the first, U(0, 1). third: (N, s')
    members mixed with the query. beta: (N, s') weight of the query, U(0, 0.5).
    """

    first: Tensor
    second: Tensor
    alpha: Tensor
    third: Tensor
    beta: Tensor


def draw_mixes(rows: int, hard: int, mixes: int, query_mixes: int, device: torch.device) -> Mixes:
    """Draw the mixes of ``rows`` queries from hard sets of ``hard`` members; uniform, with replacement.

    Everything is independent per query and mix; torch's generator of the device is used.
    """
    return Mixes(
        first=torch.randint(hard, (rows, mixes), device=device),
        second=torch.randint(hard, (rows, mixes), device=device),
        alpha=torch.rand(rows, mixes, device=device),
        third=torch.randint(hard, (rows, query_mixes), device=device),
        beta=torch.rand(rows, query_mixes, device=device) / 2,
    )


def hardest(similarity_NK: Tensor, count: int) -> Tensor:
    """Columns of each row's largest similarities, (N, min(count, K)), in no particular order; without gradient."""
    return similarity_NK.detach().topk(min(count, similarity_NK.shape[1]), dim=1, sorted=False).indices


def mix_pairs(first_NSD: Tensor, second_NSD: Tensor, alpha_NS: Tensor) -> Tensor:
    """(alpha n_i + (1 - alpha) n_j) / |.|, (N, S, D) (MoCHi, eq. 3)."""
    alpha = alpha_NS[..., None].to(first_NSD)
    return unit(alpha * first_NSD + (1 - alpha) * second_NSD)


def mix_query(q_ND: Tensor, members_NSD: Tensor, beta_NS: Tensor) -> Tensor:
    """(beta q + (1 - beta) n_j) / |.|, (N, S, D) (MoCHi, eq. 4). Below beta = 0.5 the negative outweighs the query."""
    beta = beta_NS[..., None].to(members_NSD)
    return unit(beta * q_ND[:, None] + (1 - beta) * members_NSD)


@torch.no_grad()
def synthesise(q_ND: Tensor, queue_KD: Tensor, hard_Nn: Tensor, mixes: Mixes) -> Tensor:
    """Synthetic negatives of every query, (N, s + s', D): mixes of two hard ones, then mixes with the query.

    queue_KD: unit rows. hard_Nn: rows of the queue that are hard for each query (`hardest`). All are constants.
    """

    def members(places: Tensor) -> Tensor:
        return queue_KD[hard_Nn.gather(1, places)]

    pairs = mix_pairs(members(mixes.first), members(mixes.second), mixes.alpha)
    return torch.cat([pairs, mix_query(q_ND, members(mixes.third), mixes.beta)], 1)


def with_synthetic(logits_NK: Tensor, q_ND: Tensor, synthetic_NSD: Tensor, temperature: float) -> Tensor:
    """Logits (N, K + S): those given, then the query's with its own synthetic negatives."""
    with torch.autocast(q_ND.device.type, enabled=False):
        more = torch.einsum("nd,nsd->ns", full_precision(q_ND), full_precision(synthetic_NSD)) / temperature
        return torch.cat([logits_NK, more], 1)
