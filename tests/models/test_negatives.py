"""Hard negatives: invariants of the weights (HCL) and of the mixes (MoCHi)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models.losses import info_nce, nt_xent, unit
from clipmill.models.negatives import (
    Mixes,
    draw_mixes,
    hard_nce,
    hardest,
    log_debiased,
    log_reweighted,
    mix_pairs,
    mix_query,
    pair_logits,
    synthesise,
    with_synthetic,
)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def hcl(u1: Tensor, u2: Tensor, t: float = 0.5, **options) -> Tensor:
    return hard_nce(*pair_logits(u1, u2, t), t, **options)[0].mean()


# --- weights ------------------------------------------------------------------------------------------------


def test_anchors_meet_all_but_themselves_and_their_pair() -> None:
    u1, u2 = vectors(5, 4), vectors(5, 4, seed=1)
    positive, negatives = pair_logits(u1, u2, 1.0)
    every = torch.cat([u1, u2])
    for i, anchor in enumerate(every):
        pair = (i + 5) % 10
        assert positive[i] == pytest.approx(float(anchor @ every[pair]))
        others = [float(anchor @ row) for j, row in enumerate(every) if j not in (i, pair)]
        assert negatives[i].tolist() == pytest.approx(others)


def test_neither_weighted_nor_debiased_is_nt_xent_and_the_easy_estimator() -> None:
    u1, u2 = vectors(6, 8), vectors(6, 8, seed=1)
    plain = nt_xent(u1, u2, 0.5)[0].item()
    assert hcl(u1, u2, beta=0.0, tau_plus=0.0).item() == pytest.approx(plain, rel=1e-12)
    assert hcl(u1, u2, easy=True, beta=3.0).item() == pytest.approx(plain, rel=1e-12)
    assert nt_xent(u1, u2, 0.5, reduction="reference")[0].item() == pytest.approx(2 * plain)


def test_order_rotation_and_exchange_of_views_change_nothing() -> None:
    u1, u2 = vectors(6, 4), vectors(6, 4, seed=1)
    loss = hcl(u1, u2)
    order = torch.randperm(6)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for other in (hcl(u2, u1), hcl(u1[order], u2[order]), hcl(u1 @ turn, u2 @ turn)):
        torch.testing.assert_close(other, loss)


def test_the_weighted_sum_grows_with_beta_to_the_largest() -> None:
    negatives = torch.randn(7, 9, dtype=torch.float64)
    log_r = torch.stack([log_reweighted(negatives, beta) for beta in (0.0, 0.5, 1.0, 4.0, 300.0)])
    assert bool((log_r.diff(dim=0) >= 0).all())
    torch.testing.assert_close(log_r[0], negatives.logsumexp(1))
    torch.testing.assert_close(log_r[-1], negatives.amax(1) + math.log(9), atol=0.02, rtol=0)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.7])
def test_equal_embeddings_cost_the_logarithm_of_the_candidates(tau_plus: float) -> None:
    one = vectors(1, 6).expand(5, 6)
    assert hcl(one, one, tau_plus=tau_plus).item() == pytest.approx(math.log(9))


def test_the_prior_moves_the_estimate_away_from_the_positive_down_to_the_floor() -> None:
    negatives = torch.zeros(2, 8, dtype=torch.float64)
    positive = torch.tensor([1.5, -1.5], dtype=torch.float64)  # nearer, and farther, than the negatives
    log_r = log_reweighted(negatives, 1.0)
    found = [log_debiased(positive, log_r, 8, 0.5, tau)[0] for tau in (0.0, 0.1, 0.2, 0.9)]
    nearer, farther = torch.stack(found).T
    assert bool((nearer.diff() <= 0).all())
    assert nearer[0] > nearer[1] > nearer[2]
    assert bool((farther.diff() > 0).all())
    assert nearer[-1].item() == pytest.approx(math.log(8) - 2)
    assert bool((torch.stack(found) >= math.log(8) - 2 - 1e-12).all())


def test_at_the_floor_only_the_positive_is_trained() -> None:
    positive = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    negatives = torch.full((1, 8), -1.9, dtype=torch.float64, requires_grad=True)
    losses, at_floor = hard_nce(positive, negatives, 0.5, tau_plus=0.3)
    losses.sum().backward()
    assert at_floor.tolist() == [True]
    assert negatives.grad is not None
    assert not negatives.grad.any()
    assert positive.grad is not None
    assert positive.grad.item() < 0


def test_gradients_flow_through_the_weights() -> None:
    u1, u2 = (vectors(6, 4, seed=s).requires_grad_() for s in (0, 1))
    positive, negatives = pair_logits(u1, u2, 0.5)
    whole = torch.autograd.grad(hard_nce(positive, negatives, 0.5)[0].mean(), u1, retain_graph=True)[0]
    weights = negatives.detach()
    log_r = (negatives + weights).logsumexp(1) - weights.logsumexp(1) + math.log(negatives.shape[1])
    log_g, _ = log_debiased(positive, log_r, negatives.shape[1], 0.5, 0.1)
    constant = (torch.logaddexp(positive, log_g) - positive).mean()
    assert constant.item() == pytest.approx(hard_nce(positive, negatives, 0.5)[0].mean().item())
    assert not torch.allclose(torch.autograd.grad(constant, u1)[0], whole)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
def test_sharp_temperatures_stay_finite(temperature: float) -> None:
    u1, u2 = (vectors(8, 4, seed=s).float().requires_grad_() for s in (0, 1))
    same = torch.cat([u1[:4], u2[4:]])  # half of the pairs are equal, so floors are met
    for beta in (0.0, 2.0, 8.0):
        loss = hcl(u1, same, temperature, beta=beta, tau_plus=0.3)
        loss.backward()
        assert torch.isfinite(loss)
        assert u1.grad is not None
        assert torch.isfinite(u1.grad).all()


def test_negatives_of_a_queue() -> None:
    q, k, queue = vectors(4, 8), vectors(4, 8, seed=1), vectors(20, 8, seed=2)
    loss, logits = info_nce(q, k, queue.T, 0.2)
    plain, _ = hard_nce(logits[:, 0], logits[:, 1:], 0.2, beta=0.0, tau_plus=0.0)
    torch.testing.assert_close(plain.mean(), loss)
    assert hard_nce(logits[:, 0], logits[:, 1:], 0.2, beta=1.0, tau_plus=0.0)[0].mean() > loss


# --- mixes --------------------------------------------------------------------------------------------------


def test_mixes_lie_between_their_members() -> None:
    i, j = vectors(3, 50, 6), vectors(3, 50, 6, seed=1)
    alpha = torch.rand(3, 50, dtype=torch.float64)
    h = mix_pairs(i, j, alpha)
    torch.testing.assert_close(h.norm(dim=2), torch.ones(3, 50, dtype=torch.float64))
    apart = (i * j).sum(2)
    assert bool(((h * i).sum(2) >= apart - 1e-12).all())
    assert bool(((h * j).sum(2) >= apart - 1e-12).all())
    torch.testing.assert_close(mix_pairs(i, j, torch.ones(3, 50)), i)
    torch.testing.assert_close(mix_pairs(i, i, alpha), i)


def test_a_mix_with_the_query_is_nearer_but_at_least_half_way_off() -> None:
    q, n = vectors(3, 6), vectors(3, 40, 6, seed=1)
    beta = torch.linspace(0.01, 0.5, 40, dtype=torch.float64).expand(3, 40)
    h = mix_query(q, n, beta)
    before, after = (n @ q[:, :, None])[..., 0], (h @ q[:, :, None])[..., 0]
    assert bool((after > before).all())
    angle, whole = after.clamp(max=1).acos(), before.acos()
    assert bool((angle >= whole / 2 - 1e-9).all())
    torch.testing.assert_close(angle[:, -1], whole[:, -1] / 2)


def test_synthetic_negatives_cost_more_and_are_constants() -> None:
    q, k, queue = vectors(4, 8).requires_grad_(), vectors(4, 8, seed=1), vectors(30, 8, seed=2)
    loss, logits = info_nce(q, k, queue.T, 0.2)
    hard = hardest(logits[:, 1:], 6)
    torch.manual_seed(0)
    synthetic = synthesise(q, queue, hard, draw_mixes(4, 6, 10, 3, q.device))
    assert synthetic.shape == (4, 13, 8)
    assert not synthetic.requires_grad
    mixed = with_synthetic(logits, q, synthetic, 0.2)
    harder = F.cross_entropy(mixed, torch.zeros(4, dtype=torch.int64))
    assert harder > loss
    columns = torch.cat([k[:, None], queue.expand(4, 30, 8), synthetic], 1)
    p = mixed.detach().softmax(1)
    expected = ((p[:, :, None] * columns).sum(1) - k) / 0.2 / 4
    torch.testing.assert_close(torch.autograd.grad(harder, q)[0], expected)
    order = torch.randperm(30)
    place = torch.argsort(order)
    other = synthesise(
        q,
        queue[order],
        place[hard],
        Mixes(
            first=torch.zeros(4, 1, dtype=torch.int64),
            second=torch.ones(4, 1, dtype=torch.int64),
            alpha=torch.full((4, 1), 0.3),
            third=torch.zeros(4, 0, dtype=torch.int64),
            beta=torch.zeros(4, 0),
        ),
    )
    rows = torch.arange(4)
    expected = mix_pairs(queue[hard[rows, 0]], queue[hard[rows, 1]], torch.full((4,), 0.3))
    torch.testing.assert_close(other[:, 0], expected)


def test_draws_are_independent_and_in_range() -> None:
    torch.manual_seed(0)
    mixes = draw_mixes(50, 7, 40, 30, torch.device("cpu"))
    assert set(mixes.first.flatten().tolist()) == set(mixes.third.flatten().tolist()) == set(range(7))
    assert (mixes.first == mixes.second).any()  # with replacement
    assert 0 <= float(mixes.alpha.min()) < 0.01 < 0.99 < float(mixes.alpha.max()) <= 1
    assert 0 <= float(mixes.beta.min()) < 0.01 < 0.49 < float(mixes.beta.max()) <= 0.5
    assert len({tuple(row) for row in mixes.first.tolist()}) == 50  # every query has its own


def test_no_more_hard_keys_than_there_are() -> None:
    similarity = torch.randn(3, 5)
    assert hardest(similarity, 99).shape == (3, 5)
    two = hardest(similarity, 2)
    assert {frozenset(row) for row in two.tolist()} == {
        frozenset(row) for row in similarity.argsort(1, descending=True)[:, :2].tolist()
    }
