"""Warm worker processes on this machine, each with a memory limit, killed and replaced when a task takes too long.

Workers are started as plain interpreters, so that nothing of the calling program is run again in them. They die with
the process that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from clipmill.pipeline.pack.engine import Failure

T = TypeVar("T")
R = TypeVar("R")

_BOOT = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve({descriptor}, {parent}, {memory_bytes})"
_MAX_TASKS = 500  # then a worker is replaced, so that leaks of media libraries cannot add up
_START_S = 120.0
_PR_SET_PDEATHSIG = 1


class LocalEngine:
    """An `Engine` of ``workers`` processes on this machine.

    timeout_s: wall-clock limit of a task. memory_gb: address space of a worker, the interpreter's 0.4 included.
    """

    def __init__(self, *, workers: int, timeout_s: float, memory_gb: float) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers}: at least 1 is needed")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s = {timeout_s}: give more than 0 seconds")
        if memory_gb < 0.75:
            raise ValueError(f"memory_gb = {memory_gb}: a worker needs at least 0.75 gigabytes")
        self._workers = workers
        self._timeout_s = timeout_s
        self._memory_bytes = int(memory_gb * 1e9)

    def __call__(self, run_task: Callable[[T], R], tasks: Iterable[T]) -> Generator[tuple[T, R | Failure], None, None]:
        """See `Engine`."""
        queue = iter(tasks)
        running: list[_Worker] = []
        try:
            exhausted = False
            while True:
                while not exhausted and (worker := self._idle(running, run_task)) is not None:
                    try:
                        task = next(queue)
                    except StopIteration:
                        exhausted = True
                    else:
                        worker.give(task, self._timeout_s)
                busy = [worker for worker in running if worker.busy]
                if not busy:
                    return
                pause_s = max(min(worker.deadline for worker in busy) - time.monotonic(), 0)
                ready = wait([worker.pipe for worker in busy], pause_s)
                for worker in busy:
                    if worker.pipe in ready or time.monotonic() >= worker.deadline:
                        task = worker.task
                        answer = worker.answer(worker.pipe in ready, self._timeout_s)
                        if worker.spent:
                            worker.end()
                            running.remove(worker)
                        yield task, answer
        finally:
            for worker in running:
                worker.end()

    def _idle(self, running: list[_Worker], run_task: Callable[[Any], Any]) -> _Worker | None:
        for worker in running:
            if not worker.busy:
                return worker
        if len(running) < self._workers:
            running.append(_Worker(run_task, self._memory_bytes))
            return running[-1]
        return None


class _Worker:
    """The parent's end of one process."""

    def __init__(self, run_task: Callable[[Any], Any], memory_bytes: int) -> None:
        self.pipe, child = Pipe()
        source = _BOOT.format(
            path=sys.path, module=__name__, descriptor=child.fileno(), parent=os.getpid(), memory_bytes=memory_bytes
        )
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdin=subprocess.DEVNULL,
            pass_fds=[child.fileno()],
            env=os.environ | threads,
        )
        child.close()
        self.pipe.send(run_task)
        self.busy = False
        self.spent = False
        self.deadline = 0.0
        self.task: Any = None
        self._done = 0
        self._started = False

    def give(self, task: Any, timeout_s: float) -> None:
        """Start a task. The clock of the first one starts when the worker has imported what it needs."""
        self.busy, self.task = True, task
        with contextlib.suppress(OSError, EOFError):  # it died meanwhile: `answer` will find out
            if not self._started and self.pipe.poll(_START_S):
                self.pipe.recv()
                self._started = True
            self.pipe.send(task)
        self.deadline = time.monotonic() + timeout_s

    def answer(self, ready: bool, timeout_s: float) -> Any:
        """The result of the task, or the Failure it ended in."""
        self.busy, self.task = False, None
        self._done += 1
        self.spent = True
        if not ready:
            return Failure("timeout", f"took longer than {timeout_s:g} s")
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            return self._obituary()
        if kind == "memory":
            return Failure("memory", value)
        if kind == "error":
            raise value
        self.spent = self._done >= _MAX_TASKS
        return value

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel and will end when that lets go
            self._process.wait(10)
        self.pipe.close()

    def _obituary(self) -> Failure:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGKILL:
            return Failure("memory", "its process was killed, as the system does when memory runs out")
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        return Failure("crash", f"its process died ({name})")


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(descriptor: int, parent: int, memory_bytes: int) -> None:
    """The loop of a worker process."""
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    pipe = Connection(descriptor)
    run_task = pipe.recv()
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            message = ("result", run_task(task))
        except MemoryError as error:
            message = ("memory", f"needed more than {memory_bytes / 1e9:g} GB of memory ({error})".replace(" ()", ""))
        except Exception as error:
            message = ("error", error)
        try:
            pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # an exception that cannot be pickled still has to arrive
            pipe.send(("error", RuntimeError(f"{message[1]!r} ({error})")))


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for it where it can (Linux); elsewhere a worker ends when it finds its pipe closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
