"""The local engine's workers on the machines of a Ray cluster.

One actor per processor holds a `LocalEngine` with one worker, so that media are opened in a process that can be killed
there too, under the same limits and with the same outcome. Paths travel, payloads stay in files: sources and output
must lie on a file system that all machines share. A task whose actor is lost, with its machine or alone, is given to
another; only a loss again and again is held against the file.

A message to an actor takes both sides a millisecond or two. So an actor is handed as many tasks at a time as it does
in a second; those that it has not begun by then come back.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from clipmill.pipeline.pack.engine import Failure
from clipmill.pipeline.pack.engine_local import LocalEngine

T = TypeVar("T")
R = TypeVar("R")

_LOSSES = 4  # of its actor, then a task is given up
_TURN_S = 1.0  # an actor begins the tasks that it was handed for so long
_MOST = 32  # tasks that it is handed
_FALSE_STARTS = 3  # in a row, then the cluster is
_LOOK_S = 5.0  # between two looks at the cluster
_GRACE_S = 300.0  # beyond the limit of a task, until its machine is taken for lost
_ANSWER_S = 10.0  # for a cluster to be reached
_PLACE_S = 900.0  # without any actor, until the run is given up


class RayError(ValueError):
    """Ray or a machine of the cluster cannot be used."""


class RayEngine:
    """An `Engine` on the Ray cluster at ``address``; use it in a ``with`` block.

    workers: actors, 0 = one per processor of the cluster, also of machines that join later. timeout_s, memory_gb: as
    in `LocalEngine`. address: ``HOST:PORT``, ``auto`` or ``local``; None = that of RAY_ADDRESS, else the cluster that
    runs on this machine, else one started for the occasion. folders: every machine must have them.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        memory_gb: float,
        workers: int = 0,
        address: str | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers = {workers}: give 0 (one per processor of the cluster) or more")
        self._local = LocalEngine(workers=1, timeout_s=timeout_s, memory_gb=memory_gb)
        self._lost_s = _TURN_S + timeout_s + _GRACE_S
        self._workers = workers
        self._address = address
        self._folders = [str(folder.resolve()) for folder in folders]
        self._ray: Any = None
        self._ours = False
        self._processors = (0, -_LOOK_S)  # of the cluster, and when it was asked

    def __enter__(self) -> Self:
        self._ray = _import()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    def __call__(self, run_task: Callable[[T], R], tasks: Iterable[T]) -> Generator[tuple[T, R | Failure], None, None]:
        """See `Engine`."""
        assert self._ray is not None, "use it in a with block"
        queue = _Queue(tasks)
        if not queue.has(1):
            return
        if not self._ray.is_initialized():
            _connect(self._ray, self._address)
            self._ours = True
        actor = self._ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(_Host)
        crew = _Crew(self._ray, lambda: actor.remote(self._local, run_task, self._folders), self._lost_s)
        try:
            while True:
                while (idle := crew.idle()) and queue.has(1):
                    crew.give(idle, queue.take(idle.pace))
                while crew.size < self._wanted() and queue.has(crew.starting + 1):
                    crew.start()
                if not crew.busy and not queue.has(1):
                    return
                ended, open_again = crew.wait()
                queue.give_back(open_again)
                for work, answer in ended:
                    if isinstance(answer, _Fault):
                        raise answer.error
                    yield work.task, answer
        finally:
            crew.end()

    def _wanted(self) -> int:
        """How many actors there should be."""
        now = time.monotonic()
        if not self._workers and now - self._processors[1] >= _LOOK_S:
            self._processors = max(int(self._ray.cluster_resources().get("CPU", 0)), 1), now
        return self._workers or self._processors[0]


# --- on the machines of the cluster -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fault:
    """An error of ours, to be raised by the driver as it is: Ray would wrap it."""

    error: Exception


class _Host:
    """The actor: a local engine with one worker, that is handed its tasks one by one."""

    def __init__(self, engine: LocalEngine, run_task: Callable[[Any], Any], folders: Sequence[str]) -> None:
        self._next: list[Any] = []
        self._answers = engine(run_task, self._tasks())
        self._folders = folders

    def about(self) -> tuple[str, dict[str, str], list[str]]:
        """The machine's name, its versions, and which folders it lacks."""
        return os.uname().nodename, _versions(), [folder for folder in self._folders if not os.path.isdir(folder)]

    def run(self, tasks: Sequence[Any]) -> list[Any]:
        """For each task that was begun in time: its result, the Failure it ended in, or a fault of ours."""
        until_s = time.monotonic() + _TURN_S
        answers: list[Any] = []
        for task in tasks:
            self._next.append(task)
            try:
                answers.append(next(self._answers)[1])
            except Exception as error:
                return [*answers, _Fault(error)]
            if time.monotonic() >= until_s:
                break
        return answers

    def _tasks(self) -> Iterator[Any]:
        while True:  # the engine asks when its worker is free, which it is when there is a next task
            yield self._next.pop()


def _versions() -> dict[str, str]:
    """What must be the same everywhere for the same bytes."""
    import av

    from clipmill import __version__

    return {"clipmill": __version__, "PyAV": av.__version__, "FFmpeg": av.ffmpeg_version_info}


# --- in the driver ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Work:
    """A task and how often its actor was lost."""

    task: Any
    losses: int = 0


@dataclass(frozen=True, slots=True)
class _Lost:
    """No answer came, and none will. reason, detail: as in `Failure`."""

    reason: str
    detail: str


class _Queue:
    """Tasks in their order; those that come back are first."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = iter(tasks)
        self._ahead: deque[_Work] = deque()

    def has(self, count: int) -> bool:
        """Whether there are ``count`` tasks; draws no more than these."""
        while len(self._ahead) < count:
            try:
                self._ahead.append(_Work(next(self._tasks)))
            except StopIteration:
                return False
        return True

    def take(self, most: int) -> list[_Work]:
        """The next tasks. One whose actor was lost before goes alone, so that none is blamed for another."""
        taken: list[_Work] = []
        while len(taken) < most and self.has(1) and not (taken and self._ahead[0].losses):
            taken.append(self._ahead.popleft())
            if taken[0].losses:
                break
        return taken

    def give_back(self, works: Sequence[_Work]) -> None:
        self._ahead.extendleft(reversed(works))


@dataclass(eq=False, slots=True)
class _Member:
    """An actor as the driver sees it. answer: what it will say next. works: what it was handed, none = it starts or
    waits. pace: how many tasks to hand it."""

    actor: Any
    answer: Any
    ready: bool = False
    works: Sequence[_Work] = ()
    pace: int = 1
    deadline: float = 0.0


class _Crew:
    """The actors. start: makes one. lost_s: seconds after which one that says nothing is taken for lost."""

    def __init__(self, ray: Any, start: Callable[[], Any], lost_s: float) -> None:
        self._ray = ray
        self._start = start
        self._lost_s = lost_s
        self._members: list[_Member] = []
        self._false_starts = 0
        self._alone_since = time.monotonic()

    @property
    def size(self) -> int:
        return len(self._members)

    @property
    def starting(self) -> int:
        return sum(not member.ready for member in self._members)

    @property
    def busy(self) -> bool:
        return any(member.works for member in self._members)

    def idle(self) -> _Member | None:
        """A member that waits for work."""
        return next((member for member in self._members if member.ready and not member.works), None)

    def start(self) -> None:
        """Ask the cluster for one more; it comes when a processor is free."""
        actor = self._start()
        self._members.append(_Member(actor, actor.about.remote()))

    def give(self, member: _Member, works: Sequence[_Work]) -> None:
        """Hand an actor its next tasks."""
        member.works, member.answer = works, member.actor.run.remote([work.task for work in works])
        member.deadline = time.monotonic() + self._lost_s

    def wait(self) -> tuple[list[tuple[_Work, Any]], list[_Work]]:
        """Work that ended within the next seconds with its answers, and work that is to be given to another."""
        waiting = {member.answer: member for member in self._members if member.works or not member.ready}
        said, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_LOOK_S)
        ended: list[tuple[_Work, Any]] = []
        again: list[_Work] = []
        now = time.monotonic()
        for answer, member in waiting.items():
            if answer not in said and (not member.works or now < member.deadline):
                continue
            said_what = self._hear(answer) if answer in said else _Lost("timeout", "its machine does not answer")
            if not member.works:
                self._welcome(member, said_what)
                continue
            done, left = self._settled(member, said_what)
            ended += done
            again += left
        if any(member.ready for member in self._members):
            self._alone_since = now
        elif now - self._alone_since > _PLACE_S:
            raise RayError(f"the Ray cluster has had no free processor for {_PLACE_S:g} s; see `ray status`")
        return ended, again

    def _settled(self, member: _Member, answers: Any) -> tuple[list[tuple[_Work, Any]], list[_Work]]:
        """What became of the tasks that an actor was handed: those that ended, and those for another."""
        works, member.works = member.works, ()
        if not isinstance(answers, _Lost):
            member.pace = min(2 * member.pace, _MOST) if len(answers) == len(works) else len(answers)
            return list(zip(works, answers, strict=False)), list(works[len(answers) :])
        self._dismiss(member)
        for work in works:
            work.losses += 1
        how = f"{answers.detail}, {_LOSSES} times on different workers"
        given_up = [(work, Failure(answers.reason, how)) for work in works if work.losses >= _LOSSES]
        return given_up, [work for work in works if work.losses < _LOSSES]

    def end(self) -> None:
        """Kill all actors, and with them their workers."""
        for member in list(self._members):
            self._dismiss(member)

    def _hear(self, answer: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except errors.OutOfMemoryError:
            return _Lost("memory", "its process was killed, as Ray does when memory runs out")
        except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError, errors.NodeDiedError) as error:
            return _Lost("crash", f"its process was lost ({str(error).splitlines()[0]})")
        except errors.RayTaskError as error:  # not raised by a task, but by what surrounds it: an import, for example
            raise RayError(f"a worker of the Ray cluster failed: {str(error).strip().splitlines()[-1]}") from error

    def _welcome(self, member: _Member, about: Any) -> None:
        """Take in an actor that has started, if its machine can do the work."""
        if isinstance(about, _Lost):
            self._dismiss(member)
            self._false_starts += 1
            if self._false_starts == _FALSE_STARTS:
                raise RayError(f"no worker starts on the Ray cluster: {about.detail}")
            return
        name, versions, lacking = about
        for what, version in _versions().items():
            if versions[what] != version:
                raise RayError(f"node {name} of the Ray cluster has {what} {versions[what]}, this machine {version}; "
                               "install the same on all")  # fmt: skip
        if lacking:
            raise RayError(f"node {name} of the Ray cluster has no folder {lacking[0]}; mount it there as here")
        member.ready = True
        self._false_starts = 0

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)


def _import() -> Any:
    # Read when ray is imported. Without them it warns about devices we do not ask for, reports usage to its makers, and
    # prints into our progress line and after our results.
    names = ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_USAGE_STATS_ENABLED", "RAY_SCHEDULER_EVENTS", "RAY_DEDUP_LOGS")
    for name in names:
        os.environ.setdefault(name, "0")
    try:
        import ray
    except ImportError as error:
        raise RayError(
            "the Ray engine needs Ray: pip install 'clipmill[ray]', on every machine of the cluster"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster at ``address`` or start one here."""
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is None:
            try:
                _init(ray, "auto")
            except ConnectionError:  # none runs on this machine
                _init(ray, "local")
        else:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), _ANSWER_S).close()
            _init(ray, address)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise RayError(
            f"no Ray cluster can be used at {address or 'this machine'}: {reason} (give HOST:PORT of its head, usually "
            "port 6379; one that wants a token needs RAY_AUTH_MODE=token here too)"
        ) from error


def _init(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address == "local":
        options["_node_ip_address"] = "127.0.0.1"  # nobody else needs to reach it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves /dev/null open
        ray.init(address=address, **options)
