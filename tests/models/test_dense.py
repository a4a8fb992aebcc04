"""Dense contrast: correspondence, heads, and the InfoNCE that keeps no logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipmill.models.dense import DenseNeck, bounded_info_nce, correspondence, matched
from clipmill.models.losses import info_nce, unit


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_maps_match_in_place_whatever_their_lengths() -> None:
    x = maps(3, 16, 9)
    stretched = x * torch.rand(3, 1, 9, dtype=torch.float64).add(0.1)
    assert torch.equal(correspondence(x, stretched), torch.arange(9).expand(3, 9))


def test_matches_follow_the_key_places() -> None:
    q, k = maps(2, 8, 6), maps(2, 8, 6, seed=1)
    order = torch.randperm(6)
    match, moved = correspondence(q, k), correspondence(q, k[:, :, order])
    assert torch.equal(order[moved], match)
    places = k.transpose(1, 2)
    torch.testing.assert_close(matched(places[:, order], moved), matched(places, match))
    for b in range(2):
        for i in range(6):
            best = max(range(6), key=lambda j: float(unit(q[b, :, i]) @ unit(k[b, :, j])))
            assert int(match[b, i]) == best


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 8 * 31, 1 << 20])
def test_a_bounded_loss_is_the_whole_loss(chunk_bytes: int) -> None:
    q, k, queue = unit(maps(23, 8)).requires_grad_(), unit(maps(23, 8, seed=1)), unit(maps(30, 8, seed=2)).T
    expected, logits = info_nce(q, k, queue, 0.2)
    grad = torch.autograd.grad(3 * expected, q)[0]
    loss, right = bounded_info_nce(q, k, queue, 0.2, chunk_bytes)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, q)[0], grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(right, logits.argmax(1) == 0)
    assert not right.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(bounded_info_nce(q, k, queue, 0.2, chunk_bytes)[0], expected)


def test_the_gradient_survives_keys_that_are_overwritten_before_it_is_asked_for() -> None:
    q, k, queue = unit(maps(5, 4)).requires_grad_(), unit(maps(5, 4, seed=1)), unit(maps(9, 4, seed=2)).T.clone()
    expected = torch.autograd.grad(info_nce(q, k, queue.clone(), 0.2)[0], q)[0]
    loss, _ = bounded_info_nce(q, k, queue, 0.2)
    queue.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return out


def test_memory_of_the_dense_loss_is_bounded() -> None:
    """2048 rows x 4097 columns are 32 MiB of logits; in chunks of 2 MiB no tensor is ever larger than that."""
    q, k = unit(torch.randn(2048, 32)).requires_grad_(), unit(torch.randn(2048, 32))
    queue = unit(torch.randn(4096, 32)).T
    with Largest() as whole:
        info_nce(q, k, queue, 0.2)[0].backward()
    with Largest() as bounded:
        bounded_info_nce(q, k, queue, 0.2, 2 << 20)[0].backward()
    assert whole.nbytes >= 32 << 20
    assert bounded.nbytes <= 2 << 20


def test_half_precision_is_left_before_the_logits() -> None:
    q, k, queue = unit(torch.randn(4, 8)), unit(torch.randn(4, 8)), unit(torch.randn(9, 8)).T
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bounded_info_nce(q.bfloat16(), k, queue, 0.2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(info_nce(q.bfloat16().float(), k, queue, 0.2)[0].item(), rel=1e-6)


def test_the_neck_averages_before_it_normalises() -> None:
    torch.manual_seed(0)
    neck = DenseNeck(256, 256, 8)
    x = torch.randn(3, 256, 5)
    out = neck(x)
    assert (out.one.shape, out.places.shape, out.mean.shape) == ((3, 8), (3, 5, 8), (3, 8))
    for tensor in out:
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]))
    torch.testing.assert_close(out.mean, unit(neck.mlp2(x).mean(2)))
    assert not torch.allclose(out.mean, unit(out.places.mean(1)), atol=1e-3)
    linear, conv = neck.mlp[0], neck.mlp2[0]
    assert isinstance(linear, torch.nn.Linear)
    assert isinstance(conv, torch.nn.Conv1d)
    assert float(linear.weight.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert not linear.bias.any()
    assert float(conv.weight.detach().abs().max()) <= 1 / 16
    assert conv.bias is not None
    assert conv.bias.any()
