"""Collectives, exchange of rows and global batch normalisation, with one process and with two.

Run as a script, this file is one process of a group.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clipmill.pipeline import dist

N = 6  # rows per process


def test_one_process_is_the_world() -> None:
    x = torch.randn(N, 3, requires_grad=True)
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.gather(x), x)
    assert not dist.gather(x).requires_grad
    assert dist.gather_with_grad(x) is x
    assert dist.gather_objects({"a": 1}) == [{"a": 1}]
    assert dist.any_(True)
    assert not dist.any_(False)
    order = dist.permutation(N, 5, "shuffle")
    shuffled = dist.exchange(x, order)
    assert torch.equal(shuffled, x.detach()[order])
    assert torch.equal(dist.exchange(shuffled, dist.inverse(order)), x.detach())
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert dist.sync_batch_norm(module, torch.device("cpu")) is module
    assert type(module[1]) is nn.BatchNorm1d


def test_permutation_is_a_function_of_its_key() -> None:
    first = dist.permutation(100, 1, "a")
    torch.manual_seed(7)
    assert torch.equal(first, dist.permutation(100, 1, "a"))
    assert not torch.equal(first, dist.permutation(100, 2, "a"))
    assert sorted(first.tolist()) == list(range(100))


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="no CUDA device"):
        dist.setup("cuda")


def test_two_processes(run_ranks) -> None:
    run_ranks(__file__, 2)


# --- what each of the processes checks ----------------------------------------------------------------------


def check_exchange(whole: torch.Tensor, mine: torch.Tensor) -> None:
    total = len(whole)
    first = dist.rank() * N
    for key in range(5):
        order = dist.permutation(total, key)
        shuffled = dist.exchange(mine, order)
        assert torch.equal(shuffled, whole[order][first : first + N])
        assert torch.equal(dist.exchange(shuffled, dist.inverse(order)), mine)


def check_gather(whole: torch.Tensor, mine: torch.Tensor) -> None:
    assert torch.equal(dist.gather(mine), whole)
    assert dist.gather_objects(dist.rank()) == [0, 1]
    assert dist.any_(dist.rank() == 1)
    assert not dist.any_(False)
    # A loss that couples all rows: the averaged per-process losses have the gradient of the whole.
    target = torch.randn(2 * N, 2 * N, generator=torch.Generator().manual_seed(1))
    leaf = whole.clone().requires_grad_()
    (leaf @ leaf.T - target).square().mean().backward()
    assert leaf.grad is not None
    part = mine.clone().requires_grad_()
    first = dist.rank() * N
    rows = part @ dist.gather_with_grad(part).T - target[first : first + N]
    (rows.square().mean() / dist.world()).backward()  # the division is what averaging gradients does
    torch.testing.assert_close(part.grad, leaf.grad[first : first + N], rtol=1e-12, atol=1e-14)


def check_batch_norm(dims: int) -> None:
    torch.manual_seed(0)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    whole = torch.randn(2 * N, 4, *[3] * (dims if dims > 1 else 0)).double()
    weight = torch.randn_like(whole)
    one = nn.Sequential(kind(4), kind(4, momentum=None)).double()
    nn.init.normal_(one[0].weight)
    one[1].register_parameter("bias", None)
    two = dist.sync_batch_norm(copy.deepcopy(one), torch.device("cpu"))
    assert all(type(layer) is dist.GlobalBatchNorm for layer in two)
    assert list(two.state_dict()) == list(one.state_dict())
    leaf = whole.clone().requires_grad_()
    (one(leaf) * weight).sum().backward()
    rows = slice(dist.rank() * N, dist.rank() * N + N)
    part = whole[rows].clone().requires_grad_()
    y = two(part)
    (y * weight[rows]).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(part.grad, leaf.grad[rows], rtol=1e-9, atol=1e-11)
    for name, param in two.named_parameters():  # a sum over rows: the processes' shares add up
        assert param.grad is not None
        assert one.get_parameter(name).grad is not None
        torch.testing.assert_close(dist.sum_(param.grad), one.get_parameter(name).grad, rtol=1e-9, atol=1e-11)
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(two.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    one.eval(), two.eval()
    torch.testing.assert_close(two(whole), one(whole), rtol=1e-12, atol=1e-12)


def main() -> None:
    torch.set_num_threads(1)
    dist.setup("cpu")
    whole = torch.randn(2 * N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = whole[dist.rank() * N :][:N]
    check_exchange(whole, mine)
    check_gather(whole, mine)
    for dims in (1, 2, 3):
        check_batch_norm(dims)
    module = nn.BatchNorm1d(2)
    assert module.running_mean is not None
    module.running_mean += dist.rank()
    dist.broadcast_buffers(module)
    assert module.running_mean.tolist() == [0.0, 0.0]
    linear = nn.Linear(2, 1)
    linear.weight.grad = torch.full_like(linear.weight, float(dist.rank()))
    dist.average_gradients(list(linear.parameters()))
    assert linear.weight.grad.tolist() == [[0.5, 0.5]]
    dist.barrier()
    dist.teardown()


if __name__ == "__main__":
    main()
