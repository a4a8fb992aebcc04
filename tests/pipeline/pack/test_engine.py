"""The local engine: results of all tasks, whatever some of them do to their process."""

import os
import signal
import time

import pytest

from clipmill.pipeline.pack.engine import Failure
from clipmill.pipeline.pack.engine_local import LocalEngine


def engine(workers=2, timeout_s=30.0, memory_gb=1.0):
    return LocalEngine(workers=workers, timeout_s=timeout_s, memory_gb=memory_gb)


def test_every_task_has_its_result():
    assert sorted(engine()(abs, range(-20, 0))) == [(n, -n) for n in range(-20, 0)]


def test_no_task():
    assert list(engine()(abs, [])) == []


def test_workers_stay_warm():
    assert len({pid for _, pid in engine(workers=1)(eval, ["__import__('os').getpid()"] * 5)}) == 1


def test_a_task_that_takes_too_long_is_killed_and_the_others_are_not():
    start_s = time.monotonic()
    answers = dict(engine(timeout_s=1.0)(time.sleep, [0.01, 600, 0.02, 0.03]))
    assert time.monotonic() - start_s < 30
    assert answers[600] == Failure("timeout", "took longer than 1 s")
    assert [answers[t] for t in (0.01, 0.02, 0.03)] == [None] * 3


def test_a_process_that_dies_is_replaced():
    answers = dict(engine(workers=1)(signal.raise_signal, [signal.SIGSEGV, 0, signal.SIGKILL]))
    assert answers[signal.SIGSEGV].reason == "crash"
    assert "SIGSEGV" in answers[signal.SIGSEGV].detail
    assert answers[signal.SIGKILL].reason == "memory"
    assert answers[0] is None
    assert dict(engine()(os._exit, [3]))[3].reason == "crash"


def test_memory_is_limited():
    answers = list(engine(workers=1)(eval, ["len(bytearray(10**8))", "len(bytearray(3 * 10**9))", "1 + 1"]))
    assert answers[0][1] == 10**8
    assert answers[1][1].reason == "memory"
    assert answers[2][1] == 2


def test_a_fault_of_ours_is_raised_here():
    with pytest.raises(ValueError, match="invalid literal"):
        list(engine()(int, ["1", "x"]))


def test_workers_end_when_the_caller_stops_early():
    answers = engine(workers=1)(eval, ["__import__('os').getpid()"] * 3)
    _, pid = next(answers)
    answers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_limits_that_cannot_work():
    for wrong in ({"workers": 0}, {"timeout_s": 0}, {"memory_gb": 0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine(**wrong)
