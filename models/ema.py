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


class Follower:
    """A teacher's pace: it follows once per optimiser step, before the step's first key, by weights of before it."""

    def __init__(self) -> None:
        self._due = True

    def follow(self, teacher: nn.Module, student: nn.Module, momentum: float) -> None:
        """`follow`, unless it was done since the last `renew`."""
        if self._due:
            follow(teacher, student, momentum)
            self._due = False

    def renew(self) -> None:
        """The optimiser has taken a step."""
        self._due = True
