"""The Ray engine on a real cluster of two nodes: the local engine's answers and bytes, also when a node dies."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import closing, suppress
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

import pytest

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.pack import engine_ray
from clipmill.pipeline.pack.engine import Failure
from clipmill.pipeline.pack.engine_local import LocalEngine
from clipmill.pipeline.pack.engine_ray import RayEngine, RayError
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install clipmill[ray])"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves files and processes to the garbage collector
]
LIMITS = {"timeout_s": 30.0, "memory_gb": 1.0}
TINY = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "0"}


class Nodes:
    """A cluster on this machine: a head and, as often as wanted, one more node, of one processor each."""

    def __init__(self):
        from ray._private.utils import get_ray_address_file
        from ray.cluster_utils import Cluster

        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)  # Ray itself forgets to
        self.folder = tempfile.mkdtemp(prefix="clipmill-ray-")  # short: sockets lie below it
        self.cluster = Cluster()
        self.add()

    def add(self):
        return self.cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, temp_dir=self.folder
        )

    def kill(self, node):
        """As when the plug is pulled: no process of it says good-bye."""
        self.cluster.remove_node(node, allow_graceful=False)

    def end(self):
        self.cluster.shutdown()
        del self.cluster
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes():
    """Nobody else may use it: it wants a token. No process of it may be left."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", ResourceWarning)
        patch.setenv("RAY_AUTH_MODE", "token")  # read when ray is imported
        token = token_hex(32)
        patch.setenv("RAY_AUTH_TOKEN", token)
        ray = engine_ray._import()
        nodes = Nodes()
        nodes.add()
        engine_ray._connect(ray, nodes.cluster.address)
        assert len(running(token)) >= 4  # the head's, and two raylets
        yield nodes
        ray.shutdown()
        nodes.end()
        until_s = time.monotonic() + 20
        while running(token) and time.monotonic() < until_s:
            time.sleep(0.2)
        gc.collect()  # what Ray leaves open is closed here, where nobody warns, and not in another test
        assert not running(token)


def running(token):
    """Processes of the cluster and of its engines: those that know its token."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if token.encode() in path.read_bytes():
                found.add(path.parent.name)
    return found


def engine(**facts):
    return RayEngine(**{**LIMITS, **facts})


def digests(folder):
    """Every file of a folder with its digest."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): blake2b(path.read_bytes()).hexdigest() for path in paths}


# --- as the local engine ------------------------------------------------------------------------------------


def test_tasks_have_their_results_in_warm_workers_on_both_nodes(nodes):
    with engine() as run:
        assert sorted(run(abs, range(-20, 0))) == [(n, -n) for n in range(-20, 0)]
        assert list(run(abs, [])) == []
        where = "(__import__('time').sleep(0.05), __import__('os').getppid(), __import__('os').getpid())[1:]"
        assert len({answer for _, answer in run(eval, [where] * 40)}) == 2  # processes, and actors that own them


def test_failures_are_those_of_the_local_engine(nodes):
    die = "__import__('signal').raise_signal({})"
    tasks = ["__import__('time').sleep(600)", "len(bytearray(3 * 10**9))", die.format(11), die.format(9), "1 + 1"]
    limits = {"timeout_s": 2.0, "memory_gb": 1.0}
    with engine(**limits) as run:
        far = dict(run(eval, tasks))
    assert far == dict(LocalEngine(workers=2, **limits)(eval, tasks))
    assert [far[task].reason for task in tasks[:4]] == ["timeout", "memory", "crash", "memory"]
    assert far["1 + 1"] == 2


def test_a_fault_of_ours_is_raised_here_as_it_is(nodes):
    with engine(workers=1) as run, pytest.raises(ValueError, match="invalid literal") as caught:
        list(run(int, ["1", "x"]))
    assert type(caught.value) is ValueError


def test_workers_end_when_the_caller_stops_early(nodes):
    with engine(workers=1) as run:
        with closing(run(eval, ["__import__('os').getpid()"] * 3)) as answers:
            _, pid = next(answers)
        until_s = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until_s:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_no_more_tasks_are_drawn_than_workers_can_take(nodes, monkeypatch):
    monkeypatch.setattr(engine_ray, "_MOST", 3)
    drawn = []

    def tasks():
        for number in range(30):
            drawn.append(number)
            yield number

    with engine() as run:
        for done, _ in enumerate(run(abs, tasks()), 1):
            assert len(drawn) <= done + 2 * 3 + 2  # three at each of two, and one for each that starts
    assert drawn == list(range(30))


def test_tasks_that_an_actor_does_not_begin_in_time_come_back():
    host = engine_ray._Host(LocalEngine(workers=1, **LIMITS), eval, [])
    with closing(host._answers):
        assert host.run([str(number) for number in range(5)]) == list(range(5))
        assert host.run(["1", "__import__('time').sleep(1.1)", "2"]) == [1, None]
        *answers, fault = host.run(["3", "nothing", "4"])
        assert answers == [3]
        assert isinstance(fault.error, NameError)


def test_a_task_whose_actor_was_lost_is_handed_over_alone():
    queue = engine_ray._Queue(range(8))
    assert [work.task for work in queue.take(3)] == [0, 1, 2]
    lost = queue.take(2)
    for work in lost:
        work.losses = 1
    queue.give_back(lost)
    assert [[work.task for work in queue.take(3)] for _ in range(4)] == [[3], [4], [5, 6, 7], []]


# --- what only a cluster can do -----------------------------------------------------------------------------


def test_a_worker_lost_with_its_actor_is_a_retry_and_not_the_files_fault(nodes, tmp_path):
    """The first attempt takes the actor with it, the second finds the mark of the first."""
    mark = tmp_path / "mark"
    code = f"(__import__('pathlib').Path({str(mark)!r}).touch(), __import__('os').kill(__import__('os').getppid(), 9))"
    task = f"'second' if __import__('os').path.exists({str(mark)!r}) else {code}"
    with engine(workers=1) as run:
        assert dict(run(eval, [task, "7"])) == {task: "second", "7": 7}


def test_a_file_that_takes_every_actor_with_it_is_given_up(nodes, monkeypatch):
    monkeypatch.setattr(engine_ray, "_LOSSES", 2)
    task = "__import__('os').kill(__import__('os').getppid(), 9)"
    others = [str(number) for number in range(20)]  # some are handed over with it, and are not blamed
    with engine(workers=1) as run:
        answers = dict(run(eval, [*others[:9], task, *others[9:]]))
    fault = answers.pop(task)
    assert answers == {other: int(other) for other in others}
    assert isinstance(fault, Failure)
    assert fault.reason == "crash"
    assert "2 times" in fault.detail


def test_an_actor_that_says_nothing_is_taken_for_lost(nodes, monkeypatch, tmp_path):
    """Its process is stopped, as on a machine that hangs."""
    monkeypatch.setattr(engine_ray, "_GRACE_S", 1.0)
    monkeypatch.setattr(engine_ray, "_LOOK_S", 0.5)
    mark = tmp_path / "mark"
    stop = f"(__import__('pathlib').Path({str(mark)!r}).touch(), __import__('os').kill(__import__('os').getppid(), 19))"
    task = f"'second' if __import__('os').path.exists({str(mark)!r}) else {stop}"
    with engine(workers=1, timeout_s=2.0) as run:
        assert dict(run(eval, [task])) == {task: "second"}


def test_a_machine_that_cannot_do_the_work_is_one_clear_error(nodes, monkeypatch, tmp_path):
    with (
        engine(workers=1, folders=[tmp_path / "elsewhere"]) as run,
        pytest.raises(RayError, match=r"has no folder .*elsewhere; mount"),
    ):
        list(run(abs, [1]))
    here = engine_ray._versions()
    monkeypatch.setattr(engine_ray, "_versions", lambda: here | {"PyAV": "0.1"})
    with engine(workers=1) as run, pytest.raises(RayError, match=r"PyAV .*, this machine 0\.1; install the same"):
        list(run(abs, [1]))


# --- packing ------------------------------------------------------------------------------------------------


@pytest.fixture
def media(kit):
    """Films, one of them twice, one that never ends, one that is none."""
    (kit.folder / "media").mkdir()
    paths = [
        kit.film(f"media/{number}.mp4", frames=10 + number, options=TINY, sound=kit.clicks(0.5, [0.1], 16000))
        for number in range(12)
    ]
    (kit.folder / "media/copy.mp4").write_bytes(paths[3].read_bytes())
    (kit.folder / "media/text.mp4").write_text("no video")
    times = [0, 36 * 3600 * 25, 36 * 3600 * 25 + 1]
    slow = kit.film("media/slow.mkv", frames=3, times=times)  # 36 hours: three million frames to encode
    paths = [slow, *paths, kit.folder / "media/copy.mp4", kit.folder / "media/text.mp4"]
    rows = [Source(key=path.stem, path=str(path), label=number % 2) for number, path in enumerate(paths)]
    return Corpus(sources=tuple(rows), classes=("even", "odd"))


def test_the_data_set_is_the_local_one_when_a_node_dies(nodes, kit, media):
    """It is killed while both nodes are at work, one of them on the film that never ends."""
    facts = {"root": kit.folder / "media"}
    limits = {"timeout_s": 4.0, "memory_gb": 2.0}
    settings = PackSettings(shard_clips=4)
    whole = pack(media, kit.folder / "local", settings, engine=LocalEngine(workers=2, **limits), **facts)
    assert whole.reasons == {"timeout": 1, "not_media": 1, "duplicate": 1}
    victim = next(iter(nodes.cluster.worker_nodes))
    done = []

    def kill(*numbers):
        done.append(numbers[0])
        if numbers[0] == 3:
            nodes.kill(victim)

    with engine(**limits, folders=[kit.folder / "media"]) as run:
        far = pack(media, kit.folder / "ray", settings, engine=run, on_progress=kill, **facts)
    assert digests(kit.folder / "ray") == digests(kit.folder / "local")
    assert (far.counts, far.reasons) == (whole.counts, whole.reasons)
    assert done == list(range(15))
    assert not victim.any_processes_alive()
    nodes.add()


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "clipmill.tools.cli", "pack", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip


def test_the_command_uses_the_cluster_that_it_is_told_or_one_of_its_own(nodes, kit, media):
    root = kit.folder / "media"
    (root / "slow.mkv").unlink()
    done = command(root, kit.folder / "a", "--engine", "ray", "--json", RAY_ADDRESS=nodes.cluster.address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"ok": 12, "salvaged": 0, "rejected": 1, "duplicate": 1}
    own = command(root, kit.folder / "b", "--engine", "ray", "--address", "local", "--workers", "1")
    assert own.returncode == 0, own.stderr
    assert digests(kit.folder / "a") == digests(kit.folder / "b")
    wrong = command(root, kit.folder / "c", "--engine", "ray", "--address", "127.0.0.1:1")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "no Ray cluster can be used at 127.0.0.1:1" in wrong.stderr


def test_without_ray_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r"pip install 'clipmill\[ray\]'"), engine():
        pass


def test_limits_that_cannot_work():
    for wrong in ({"workers": -1}, {"timeout_s": 0}, {"memory_gb": 0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine(**wrong)
