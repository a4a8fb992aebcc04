"""`pack --task I/N` and `--finish`: several processes on one folder, and the same bytes as one alone."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from itertools import chain

import pytest

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.pack import folder
from clipmill.pipeline.pack.plan import PackError, Share
from clipmill.pipeline.pack.run import finish, pack
from clipmill.pipeline.pack.settings import PackSettings

TINY = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "0"}
SETTINGS = PackSettings(shard_clips=2)


def digests(root):
    """Every file of a folder with its digest."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): blake2b(path.read_bytes()).hexdigest() for path in paths}


def here(run_task, tasks):
    for task in tasks:
        yield task, run_task(task)


@pytest.fixture
def media(kit):
    """Nine films, one of them twice, and one that is none: six shards of two, the fifth with a duplicate."""
    root = kit.folder / "media"
    root.mkdir()
    for number in range(9):
        kit.film(f"media/{number}.mp4", frames=8 + number, options=TINY)
    (root / "9.mp4").write_bytes((root / "0.mp4").read_bytes())
    (root / "text.mp4").write_text("no video")
    return root


@pytest.fixture
def corpus(media):
    paths = sorted(media.iterdir())
    return Corpus(sources=tuple(Source(key=path.stem, path=str(path)) for path in paths))


def test_shares_are_disjoint_and_complete():
    for count in (0, 1, 5, 12):
        for of in (1, 3, 20):
            parts = [list(Share(number, of).shards(count)) for number in range(1, of + 1)]
            assert sorted(chain.from_iterable(parts)) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for number, of in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(ValueError, match="tasks are numbered"):
            Share(number, of)


def test_tasks_one_after_the_other_and_finish(kit, corpus, media):
    pack(corpus, kit.folder / "whole", SETTINGS, root=media, engine=here)
    out = kit.folder / "packed"
    with pytest.raises(PackError, match="nothing has been packed there yet"):
        finish(corpus, out, SETTINGS, root=media)
    assert not out.exists()
    calls = []

    def count(*numbers):
        calls.append(numbers)

    part = pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(2, 4), on_progress=count)
    assert part.counts == {"ok": 2, "salvaged": 0, "rejected": 1}
    assert part.reasons == {"not_media": 1}
    assert calls[-1][:4] == (3, 3, 2, 1)
    with pytest.raises(PackError, match=r"4 of 6 shards are missing \(0, 2, 3, 4\).* --task 1/4, 3/4, 4/4$"):
        finish(corpus, out, SETTINGS, root=media)
    for number in (4, 1, 3):
        pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(number, 4))
    assert not finish(corpus, out, SETTINGS, root=media).already
    assert digests(out) == digests(kit.folder / "whole")
    assert pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(3, 4)).already
    assert finish(corpus, out, SETTINGS, root=media).already
    assert not (out / ".pack").exists()


def test_tasks_and_a_plain_pack_continue_each_other(kit, corpus, media):
    pack(corpus, kit.folder / "whole", SETTINGS, root=media, engine=here)
    expected = digests(kit.folder / "whole")
    out = kit.folder / "tasks-then-plain"
    pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(1, 3))
    shard = out / "shard-00000.tar"
    written = shard.stat().st_mtime_ns
    pack(corpus, out, SETTINGS, root=media, engine=here)
    assert shard.stat().st_mtime_ns == written
    assert digests(out) == expected

    class Stop(BaseException):
        pass

    def stop(done, *_):
        if done == 5:
            raise Stop

    out = kit.folder / "plain-then-tasks"
    with pytest.raises(Stop):
        pack(corpus, out, SETTINGS, root=media, engine=here, on_progress=stop)
    with pytest.raises(PackError, match="again without --finish"):
        finish(corpus, out, SETTINGS, root=media)
    for number in (1, 2):  # another number of tasks than before is no matter once these have ended
        pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(number, 2))
    pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(3, 3))
    finish(corpus, out, SETTINGS, root=media)
    assert digests(out) == expected


def test_other_settings_are_an_error_for_every_task(kit, corpus, media):
    out = kit.folder / "packed"
    pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(1, 2))
    other = PackSettings(shard_clips=2, gop=4)
    with pytest.raises(PackError, match="gop = 8, not 4"):
        pack(corpus, out, other, root=media, engine=here, share=Share(2, 2))
    with pytest.raises(PackError, match="gop = 8, not 4"):
        finish(corpus, out, other, root=media)


def test_who_may_write_at_the_same_time(kit, corpus, media):
    out = kit.folder / "packed"
    with folder.owned(out, Share(1, 3)), folder.owned(out, Share(2, 3)):
        for share, message in (
            (None, "another `clipmill pack` is writing"),
            (Share(2, 3), "another `clipmill pack --task 2/3` is writing"),
            (Share(3, 4), r"`pack --task ./3` is writing there; wait, or count to 3"),
        ):
            with pytest.raises(PackError, match=message):
                pack(corpus, out, SETTINGS, root=media, engine=here, share=share)
        pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(3, 3))
        with pytest.raises(PackError, match="is writing there; wait for it"):
            finish(corpus, out, SETTINGS, root=media)
    with folder.owned(out), pytest.raises(PackError, match="without --task is writing"):
        pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(1, 3))


def test_a_task_cleans_up_after_itself_and_nobody_else(kit, corpus, media):
    out = kit.folder / "packed"
    pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(1, 3))
    mine = [".pack/run-2-of-3-00c0ffee", ".pack/done/00004.partial"]
    others = [".pack/run-3-of-3-00c0ffee", ".pack/done/00002.partial"]
    for name in mine + others:
        (out / name).mkdir()
        (out / name / "file").touch()
    (out / "shard-00001.tar.partial").touch()
    (out / "shard-00005.tar.partial").touch()
    pack(corpus, out, SETTINGS, root=media, engine=here, share=Share(2, 3))
    assert not any((out / name).exists() for name in [*mine, "shard-00001.tar.partial"])
    assert all((out / name).exists() for name in [*others, "shard-00005.tar.partial"])


def test_without_locks_nothing_is_written(kit, corpus, media, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(PackError, match="its file system has no locks"):
        pack(corpus, kit.folder / "packed", SETTINGS, root=media, engine=here, share=Share(1, 2))
    assert not list(kit.folder.glob("packed/*.tar"))


# --- as commands --------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "clipmill.tools.cli", "pack"]
ARGUMENTS = ["--shard-clips", "2", "--workers", "1"]


def start(media, out, *more):
    return subprocess.Popen(
        [*COMMAND, str(media), str(out), *ARGUMENTS, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(media, out, *more):
    process = start(media, out, *more)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def test_three_processes_at_once_one_of_them_killed(kit, media):
    """They race for the plan; one is killed with kill -9 in the middle of its work and started again."""
    for number in range(12):
        kit.film(f"media/more-{number}.mp4", frames=60 + number, options=TINY)
    assert run(media, kit.folder / "whole")[0] == 0
    out = kit.folder / "packed"
    tasks = [start(media, out, "--task", f"{number}/3") for number in (1, 2, 3)]
    until_s = time.monotonic() + 60
    while not list(out.glob(".pack/run-2-of-3-*/*")) and time.monotonic() < until_s:
        time.sleep(0.01)
    tasks[1].send_signal(signal.SIGKILL)
    killed = tasks[1].wait()
    assert killed == -signal.SIGKILL
    code, _, stderr = run(media, out, "--finish")
    assert code == 2
    assert "writing there" in stderr or "shards are missing" in stderr
    again = start(media, out, "--task", "2/3")
    for process in (tasks[0], tasks[2], again):
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert "after all tasks" in stdout
    tasks[1].communicate()
    code, stdout, stderr = run(media, out, "--finish", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["counts"] == {"ok": 21, "salvaged": 0, "rejected": 1, "duplicate": 1}
    assert digests(out) == digests(kit.folder / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "0/3"], "tasks are numbered from 1/3 to 3/3"),
        (["--task", "4/3"], "tasks are numbered from 1/3 to 3/3"),
        (["--task", "two"], "--task two: give I/N"),
        (["--task", "-1/3"], "--task -1/3: give I/N"),
        (["--task", "1/3", "--finish"], "leave --task out"),
        (["--finish"], "nothing has been packed there yet"),
        (["--address", "host:1"], "add --engine ray"),
        (["--engine", "ray", "--estimate"], "leave --engine ray out"),
        (["--estimate", "--task", "1/2"], "leave --task and --finish out"),
    ],
)
def test_options_that_make_no_sense_are_one_clear_error(media, kit, arguments, message, capsys):
    from clipmill.tools.cli import main

    assert main(["pack", str(media), str(kit.folder / "packed"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (kit.folder / "packed").exists()
