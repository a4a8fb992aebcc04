"""NT-Xent and InfoNCE: their invariants, closed forms and an independent formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clipmill.models.losses import accuracy, entropy, full_precision, info_nce, nt_xent, unit


def _pairs(n: int = 6, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, d).double(), torch.randn(n, d).double()


def _published(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> float:
    """Equation 1 of the paper, row by row."""
    u = F.normalize(torch.cat([z1, z2]), dim=1).tolist()
    n, total = len(z1), 0.0
    for i in range(2 * n):
        similarity = [math.exp(sum(a * b for a, b in zip(u[i], u[j], strict=True)) / temperature) for j in range(2 * n)]
        total -= math.log(similarity[(i + n) % (2 * n)] / (sum(similarity) - similarity[i]))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_published_formula_and_the_reference_is_twice_that(temperature: float) -> None:
    z1, z2 = _pairs()
    loss, logits = nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(_published(z1, z2, temperature), rel=1e-12)
    assert nt_xent(z1, z2, temperature, reduction="reference")[0].item() == pytest.approx(2 * loss.item(), rel=1e-12)
    torch.testing.assert_close(logits, unit(z1) @ unit(z2).T / temperature)


def test_order_of_views_and_samples_does_not_matter() -> None:
    z1, z2 = _pairs()
    loss = nt_xent(z1, z2, 0.3)[0]
    order = torch.randperm(6)
    torch.testing.assert_close(nt_xent(z2, z1, 0.3)[0], loss)
    torch.testing.assert_close(nt_xent(z1[order], z2[order], 0.3)[0], loss)


def test_length_of_an_embedding_does_not_matter_and_gets_no_gradient() -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs())
    loss = nt_xent(z1, z2, 0.3)[0]
    loss.backward()
    assert z1.grad is not None
    torch.testing.assert_close((z1 * z1.grad).sum(1), torch.zeros(6).double(), atol=1e-14, rtol=0)
    scaled = z1.detach() * torch.rand(6, 1).double().add(0.1)
    torch.testing.assert_close(nt_xent(scaled, z2, 0.3)[0], loss)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equal_embeddings_cost_the_logarithm_of_the_candidates(temperature: float) -> None:
    z = torch.ones(7, 4).double()
    assert nt_xent(z, z, temperature, reduction="reference")[0].item() == pytest.approx(2 * math.log(13))


def test_perfect_orthonormal_embeddings() -> None:
    z = torch.eye(5).double()
    assert nt_xent(z, z, 0.2)[0].item() == pytest.approx(math.log(1 + 8 * math.exp(-1 / 0.2)))


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_shards_give_the_loss_and_gradient_of_the_whole(replicas: int) -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs())
    whole = nt_xent(z1, z2, 0.2)[0]
    expected = torch.autograd.grad(whole, (z1, z2))
    n = 6 // replicas
    parts = [
        nt_xent(z1[r * n : r * n + n], z2[r * n : r * n + n], 0.2, columns=(z1, z2), offset=r * n)[0]
        for r in range(replicas)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole)
    for got, want in zip(torch.autograd.grad(mean, (z1, z2)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_info_nce_is_cross_entropy_over_one_positive_and_the_queue() -> None:
    q, k = (unit(z) for z in _pairs(4, 8))
    queue = F.normalize(torch.randn(8, 20).double(), dim=0)
    loss, logits = info_nce(q, k, queue, 0.07)
    positive = torch.exp((q * k).sum(1) / 0.07)
    expected = -(positive / (positive + torch.exp(q @ queue / 0.07).sum(1))).log().mean()
    torch.testing.assert_close(loss, expected)
    assert logits.shape == (4, 21)


def test_info_nce_of_one_vector_everywhere() -> None:
    one = F.normalize(torch.ones(1, 8), dim=1)
    loss, _ = info_nce(one.repeat(3, 1), one.repeat(3, 1), one.T.repeat(1, 50), 0.07)
    assert loss.item() == pytest.approx(math.log(51), rel=1e-6)


def test_half_precision_is_left_before_the_logits() -> None:
    z1, z2 = (z.bfloat16() for z in _pairs())
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = nt_xent(z1, z2, 0.05)
        other, _ = info_nce(unit(z1), unit(z2), unit(z1).T, 0.05)
    assert (loss.dtype, logits.dtype, other.dtype) == (torch.float32,) * 3
    assert loss.item() == pytest.approx(nt_xent(z1.float(), z2.float(), 0.05)[0].item(), rel=1e-6)
    assert full_precision(z1.double()).dtype == torch.float64


def test_accuracy_and_entropy() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 5.0], [2.0, 0.0]])
    assert accuracy(logits, 0).item() == pytest.approx(2 / 3)
    assert accuracy(logits, torch.tensor([0, 1, 1])).item() == pytest.approx(2 / 3)
    assert entropy(torch.zeros(3, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
