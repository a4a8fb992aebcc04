"""Teachers: copies of a network that follow it by an exponential moving average of parameters."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """A copy of ``student`` with the same weights, of which nothing is trainable."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, over parameters only.

    Buffers (running statistics) of the teacher evolve on their own. momentum 0 copies, 1 changes nothing.
    """
    mine: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    assert len(mine) == len(theirs), "teacher and student differ"
    torch._foreach_lerp_(mine, theirs, 1.0 - momentum)


def in_groups(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """A batch in equal parts, to pass through a network one by one, each with batch statistics of its own.

    One process then plays several. Raises ValueError if the batch cannot be cut so.
    """
    if len(x) % groups:
        raise ValueError(f"{len(x)} samples per process cannot be cut into {groups} groups; use a multiple of groups")
    return x.split(len(x) // groups)
