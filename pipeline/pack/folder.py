"""Who may write into an output folder, on one machine or on several that share it: locks, and what is removed when.

A plain `pack` and `--finish` own the whole folder. Tasks share it: each owns its number, and all that are at work count
to the same total, so that no shard ever has two writers. The kernel gives the locks of a dead process back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from clipmill.pipeline.pack.plan import PackError, Share
from clipmill.pipeline.pack.write import DATASET_FILE, WORK_FOLDER, done_folder, shard_name

_REMOVE_S = 10.0


@contextmanager
def owned(out: Path, share: Share | None = None) -> Iterator[None]:
    """Own the output folder or a share of it; it must be new, empty, finished or one that an earlier call began."""
    work = out / WORK_FOLDER
    if out.exists():
        if not out.is_dir():
            raise PackError(f"{out}: is not a folder; choose another output folder")
        strange = {path.name for path in out.iterdir()} - {WORK_FOLDER}
        if strange and DATASET_FILE not in strange and not work.is_dir():
            raise PackError(f"{out}: holds something else already; choose a new or empty output folder")
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        whole = stack.enter_context((work / "lock").open("a+b"))
        if share is None:
            if not _try(whole, fcntl.LOCK_EX):
                raise PackError(f"{out}: another `clipmill pack` is writing there; wait for it")
        else:
            if not _try(whole, fcntl.LOCK_SH):
                raise PackError(f"{out}: a `clipmill pack` without --task is writing there; wait for it")
            own = stack.enter_context((work / f"task-{share.number}-of-{share.of}").open("a+b"))
            if not _try(own, fcntl.LOCK_EX):
                raise PackError(f"{out}: another `clipmill pack --task {share}` is writing there; wait for it")
            os.utime(own.name)
            _check_totals(out, share)
        yield


@contextmanager
def planning(out: Path) -> Iterator[None]:
    """Let one process at a time make or read the plan; the others wait."""
    with (out / WORK_FOLDER / "planning").open("a+b") as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


def shares(out: Path) -> list[Share]:
    """Tasks that have worked here, the latest last."""
    paths = sorted((out / WORK_FOLDER).glob("task-*-of-*"), key=lambda path: path.stat().st_mtime_ns)
    return [_share_of(path) for path in paths]


def _check_totals(out: Path, share: Share) -> None:
    """Every task takes its own lock before it looks at the others', so of two totals at most one goes on."""
    for path in (out / WORK_FOLDER).glob("task-*-of-*"):
        other = _share_of(path)
        if other.of != share.of:
            with path.open("a+b") as file:
                if not _try(file, fcntl.LOCK_EX):
                    raise PackError(f"{out}: `pack --task {other}` is writing there; wait, or count to {other.of} too")


def _share_of(path: Path) -> Share:
    _, number, _, of = path.name.split("-")
    return Share(int(number), int(of))


def _try(file: IO[bytes], kind: int) -> bool:
    try:
        _lock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(file: IO[bytes], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise PackError(
                f"{file.name}: its file system has no locks ({error.strerror}); mount it with them (Lustre: -o flock) "
                "or choose another output folder"
            ) from error
        raise


def remove_tree(path: Path) -> None:
    """Remove a folder into which a process that is just being killed, here or elsewhere, may still write."""
    until_s = time.monotonic() + _REMOVE_S
    while path.is_dir():
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EBUSY) or time.monotonic() > until_s:
                raise
            time.sleep(0.1)


def clear(out: Path) -> None:
    """Remove the work folder of a finished data set."""
    remove_tree(out / WORK_FOLDER)


def undo(out: Path, created: bool) -> None:
    """Remove everything of a data set that came to nothing."""
    clear(out)
    if created:
        with suppress(OSError):
            out.rmdir()


def clean(out: Path, share: Share | None = None, count: int = 0) -> None:
    """Remove what an interrupted run left over, but nothing that is finished.

    share: only what belongs to this task; count: shards in all.
    """
    work = out / WORK_FOLDER
    if share is None:
        found = [*out.glob("*.partial"), *work.glob("*.partial"), *work.glob("done/*.partial"), *work.glob("run-*")]
    else:
        found = list(work.glob(f"{run_name(share)}-*"))
        for number in share.shards(count):
            found += [out / f"{shard_name(number)}.partial", done_folder(out, number).with_suffix(".partial")]
    for path in found:
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def run_name(share: Share | None) -> str:
    """How the folder for payload files of a run begins."""
    return "run" if share is None else f"run-{share.number}-of-{share.of}"
