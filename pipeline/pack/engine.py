"""What an engine is: something that runs a function over tasks, somewhere else, and survives what happens there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that gave no answer. reason: ``timeout``, ``memory`` or ``crash``."""

    reason: str
    detail: str


class Engine(Protocol):
    """Runs tasks in other processes. Paths travel, payloads stay in files."""

    def __call__(self, run_task: Callable[[T], R], tasks: Iterable[T]) -> Generator[tuple[T, R | Failure], None, None]:
        """Yield (task, its result) in the order they end. ``tasks`` is asked for the next only when a worker is free.

        run_task: a function that can be imported by name. An exception it raises is raised here, except MemoryError,
        which is a Failure like running out of time or dying.
        """
        ...
