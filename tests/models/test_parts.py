"""Heads, the key queue, and teachers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipmill.models.ema import follow, teacher_of
from clipmill.models.heads import mlp, simclr_head
from clipmill.models.queue import KeyQueue

# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_projection_head_has_no_bias_and_no_last_shift(layers: int) -> None:
    torch.manual_seed(0)
    head = simclr_head(200, 16, layers)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
    assert [layer.out_features for layer in linear] == [200] * (layers - 1) + [16]
    assert len(norms) == layers
    assert all(layer.bias is None for layer in linear)
    assert norms[-1].bias is None
    assert all(norm.bias is not None for norm in norms[:-1])
    assert sum(isinstance(layer, nn.ReLU) for layer in head) == layers - 1
    assert float(linear[0].weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    y = head(torch.randn(32, 200))
    torch.testing.assert_close(y.mean(0), torch.zeros(16), atol=1e-5, rtol=0)  # scale only: still centred


def test_a_shift_of_zero_is_no_shift() -> None:
    torch.manual_seed(0)
    head = simclr_head(8, 4)
    with_shift = mlp((8, 8, 4), bias=False, norm="affine", last_norm="affine")
    with_shift.load_state_dict(head.state_dict(), strict=False)
    x = torch.randn(16, 8)
    torch.testing.assert_close(with_shift(x), head(x))


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        simclr_head(8, 4, 0)


# --- queue --------------------------------------------------------------------------------------------------


def test_the_queue_holds_the_last_keys_in_order() -> None:
    queue = KeyQueue(2, 10)
    keys = torch.arange(46.0).view(23, 2)
    written = [queue.push(keys[start : start + count]) for start, count in ((0, 3), (3, 8), (11, 4), (15, 8))]
    assert [columns.tolist() for columns in written[:2]] == [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 0]]  # wraps inside
    assert int(queue.position) == 23 % 10
    newest_last = torch.roll(queue.keys, -int(queue.position), 1).T
    assert torch.equal(newest_last, keys[-10:])


def test_more_keys_than_the_queue_holds_leave_the_newest() -> None:
    queue = KeyQueue(1, 4)
    queue.push(torch.arange(3.0)[:, None])
    written = queue.push(torch.arange(10.0, 20.0)[:, None])
    assert queue.keys[0, written].tolist() == [16.0, 17.0, 18.0, 19.0]
    assert int(queue.position) == 13 % 4


def test_a_queue_of_whole_writes_refuses_batches_that_do_not_divide_it() -> None:
    queue = KeyQueue(2, 10, whole_writes=True)
    queue.push(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="10 keys cannot be filled by batches of 4"):
        queue.push(torch.zeros(4, 2))


def test_first_keys() -> None:
    torch.manual_seed(0)
    normal, uniform = KeyQueue(48, 500), KeyQueue(48, 500, init="uniform")
    torch.testing.assert_close(normal.keys.norm(dim=0), torch.ones(500))
    assert float(uniform.keys.abs().max()) <= 0.25
    assert float(uniform.keys.square().sum(0).mean()) == pytest.approx(1.0, rel=0.02)
    with pytest.raises(ValueError, match="got 0 of 8"):
        KeyQueue(8, 0)


def test_the_queue_travels_with_its_position() -> None:
    queue, other = KeyQueue(2, 6), KeyQueue(2, 6)
    queue.push(torch.ones(4, 2))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(torch.full((4, 2), 2.0))
    assert torch.equal(queue.keys, other.keys)
    assert int(other.position) == 2


# --- teachers -----------------------------------------------------------------------------------------------


def test_a_teacher_follows_parameters_and_keeps_its_buffers() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = teacher_of(student)
    assert not any(param.requires_grad for param in teacher.parameters())
    assert all(param.requires_grad for param in student.parameters())
    student[1](torch.randn(8, 3))
    with torch.no_grad():
        for param in student.parameters():
            param.add_(1.0)
    before = [param.clone() for param in teacher.parameters()]
    follow(teacher, student, 0.9)
    for new, old, theirs in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theirs.detach())
    assert torch.equal(teacher[1].running_mean, torch.zeros(3))


def test_momentum_zero_copies_and_one_freezes() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen = teacher.weight.clone()
    follow(teacher, student, 1.0)
    assert torch.equal(teacher.weight, frozen)
    follow(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)
