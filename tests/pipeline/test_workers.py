"""Decode processes: what dies is replaced, what kills is left out, and no batch depends on either."""

import importlib
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.memory import SharedBuffer
from clipmill.pipeline.spec import VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, View
from clipmill.pipeline.workers import WorkerDiedError

# A decoder that kills its process at some records. The module is importable in decode processes, because they get the
# parent's search path, and found as a backend, because it adds its folder to those where backends are looked for.
CRASHING = '''
import os, signal, threading, time
from dataclasses import dataclass
import clipmill.pipeline.decode as backends
from clipmill.pipeline.decode import libav
from clipmill.pipeline.views import Clips

HERE = os.path.dirname(__file__)
if HERE not in backends.__path__:
    backends.__path__.append(HERE)
DEADLY = {"video/2": signal.SIGSEGV, "video/4": signal.SIGABRT}

@dataclass(frozen=True, slots=True, kw_only=True)
class HereClips(Clips):
    """Brings this module into the decode process."""

def new(reader):
    return Decoder(reader)

class Decoder(libav.LibavDecoder):
    def fill(self, record, targets, payload):
        time.sleep(0.002)
        if record.key in DEADLY:
            signal.pthread_kill(threading.get_ident(), DEADLY[record.key])  # at once, as a real crash is
        return super().fill(record, targets, payload)
'''
VIEW = View(name="clip", num_frames=4, augment=VideoSpec(size=16, crop=WholeFrame(), ops=()))


@pytest.fixture
def crashing(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from clipmill.pipeline import decode

    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decode, "__path__", list(decode.__path__))
    module = importlib.import_module("crashing")
    yield module
    sys.modules.pop("crashing")
    sys.modules.pop("clipmill.pipeline.decode.crashing", None)


def loader_of(dataset, planner=None, repeat=6, **config) -> Loader:
    settings = LoaderConfig(**{"threads": 2, "processes": 1, "ahead": 2, "max_damaged": 0.5, **config})
    planner = planner or Clips(views=(VIEW,))
    return Loader(dataset, planner, batch_size=3, seed=2, repeat=repeat, shuffle=False, config=settings)


def collect(loader: Loader, meanwhile=lambda number: None) -> list[torch.Tensor]:
    parts = []
    with loader:
        for number, batch in enumerate(loader.epoch()):
            parts += [batch.index, batch.video["clip"]]
            meanwhile(number)
    return parts


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_process_killed_from_outside_changes_nothing(dataset):
    expected = collect(loader_of(dataset, processes=0))
    loader = loader_of(dataset)

    def kill(batch: int) -> None:
        if batch in (1, 5):
            os.kill(loader._ring._workers[0].pid, signal.SIGKILL if batch == 1 else signal.SIGSEGV)

    batches = collect(loader, kill)
    assert_same(batches, expected)
    assert loader.damaged == {}


def test_a_killed_process_is_replaced_even_when_nothing_is_asked_of_it(dataset):
    loader = loader_of(dataset)
    with loader:
        list(loader.epoch())
        worker = loader._ring._workers[0]
        pid = worker.pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while worker.deaths == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(loader.epoch(1))) == len(loader)
        assert worker.deaths == 1
        assert worker.pid != pid


@pytest.mark.parametrize("processes", [1, 2])
def test_records_that_kill_the_decoder_are_replaced_by_their_successors(dataset, crashing, processes):
    planner = crashing.HereClips(views=(VIEW,))
    loader = loader_of(dataset, planner, repeat=1, decoder="crashing", processes=processes)
    batches = collect(loader)
    numbers = torch.cat(batches[::2]).tolist()
    assert numbers == [0, 1, 3, 3, 5, 5]
    assert sorted(loader.damaged) == [2, 4]
    assert "signal 11, SIGSEGV" in loader.damaged[2]
    assert "signal 6, SIGABRT" in loader.damaged[4]
    plain = collect(loader_of(dataset, repeat=1, processes=0))
    for row in (0, 1):  # the others are what they are without the deadly ones
        assert torch.equal(batches[1][row], plain[1][row])


def test_a_process_that_cannot_start_is_given_up(dataset, crashing, tmp_path):
    planner = crashing.HereClips(views=(VIEW,))
    (tmp_path / "crashing.py").write_text("import os; os._exit(7)")
    loader = loader_of(dataset, planner)
    with pytest.raises(WorkerDiedError, match=r"exit code 7.*clipmill verify"), loader:
        list(loader.epoch())
    assert not [thread for thread in threading.enumerate() if thread.name == "clipmill-listen"]


def test_shared_memory_grows_for_all_who_map_it_and_leaves_nothing_behind():
    mine = SharedBuffer()
    mine.fit(100)[:100] = np.arange(100)
    other = SharedBuffer(mine.path)
    other.fit(10_000)[9_999] = 7
    assert np.array_equal(other.array[:100], np.arange(100))
    assert mine.fit(10_000)[9_999] == 7
    kept = mine.array
    mine.close()
    other.close()
    assert kept[9_999] == 7
    with pytest.raises(OSError):
        SharedBuffer(mine.path)
