"""``clipmill``: finds the command, reads its options, and turns every outcome into an exit code.

A command is a module of this folder with a frozen dataclass ``Args`` and ``main(args) -> int``. One that reads its
own command line has ``parse(argv) -> Args`` too. Nothing heavy is imported before the command is known.

Exit codes: 0 success, 1 the command's own "no", 2 wrong use or an input that cannot be used, 130 interrupted, 141
the reader of our output went away.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from clipmill import __version__

COMMANDS = {  # name: (module below clipmill.tools, what it does)
    "synth": ("synth", "make synthetic corpora with known motion, sound, masks and boxes"),
    "pack": ("pack", "raw videos, images and sound -> shards and index (resumable)"),
    "verify": ("verify", "check every byte and every frame of a packed data set"),
    "inspect": ("inspect", "look at a packed data set: pictures, numbers, rejects, views"),
    "pretrain": ("pretrain", "train a method on a packed data set -> run folder and encoder"),
    "evaluate": ("evaluate.command", "measure an encoder: kNN, linear probe and other benchmarks"),
    "bench": ("bench.command", "measure loading speed against peers and floors"),
    "report": ("report", "one HTML page of one or more runs: curves, throughput, scores"),
    "export": ("export", "an encoder's weights in torchvision's or timm's key layout"),
    "doctor": ("doctor", "what works on this machine, and how to get what does not"),
    "methods": ("methods", "list the methods and their recipes"),
    "demo": ("demo", "the whole pipeline on a synthetic corpus in a few minutes"),
}
TRACEBACK = "CLIPMILL_TRACEBACK"
_PATH = (str, bytes, os.PathLike)  # an error's file name may also be the number of an open file


def usage() -> str:
    """The text of ``clipmill --help``."""
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: clipmill COMMAND [OPTIONS]",
            "",
            "Pack raw video, stream clips to the device, pretrain without labels, evaluate.",
            "",
            "commands:",
            *lines,
            "",
            "  clipmill COMMAND --help   the options of one command",
            "  clipmill --version        print the version",
            "",
            f"An error is one line; set {TRACEBACK}=1 to see where it came from.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's own) and return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
    except SystemExit as stop:  # from the option parser: help and usage errors
        if isinstance(stop.code, str):
            return _fail(stop.code)
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("clipmill: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
            return 141
        message = _explain(error, argv)
        if message is None:
            raise
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        return _fail(message)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"clipmill {__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(_unknown(name))
    module = import_module(f"clipmill.tools.{COMMANDS[name][0]}")
    if hasattr(module, "parse"):
        return module.main(module.parse(rest))
    import tyro

    return module.main(tyro.cli(module.Args, prog=f"clipmill {name}", args=rest))


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    kind, known = ("option", ("--help", "--version")) if name.startswith("-") else ("command", tuple(COMMANDS))
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`clipmill --help` lists the commands"
    return f"unknown {kind} {name!r}; {remedy}"


def _fail(message: str) -> int:
    print(f"clipmill: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _explain(error: Exception, argv: Sequence[str]) -> str | None:
    """One sentence for the user; None when the error is a fault of the program and its traceback is wanted."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where, free, total = fullest_disk([error.filename, error.filename2, *argv])
        return f"no space left on the disk of {where} ({free:.1f} of {total:.1f} GiB free); free some or use another"
    if isinstance(error, OSError) and isinstance(error.filename, _PATH) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("clipmill"):
        return f"the package {error.name!r} is not installed; `clipmill doctor` says how to get it"
    meant_for_users = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("clipmill.")
    return (str(error) or type(error).__name__) if meant_for_users else None


def fullest_disk(names: Iterable[object]) -> tuple[Path, float, float]:
    """(mount point, GiB free, GiB in all) of the disk with the least room among those of the named paths.

    names: anything from a command line; what is not a path is harmless. The current folder is looked at too, and the
    folder for temporary files and shared memory.
    """
    import shutil
    import tempfile

    texts = [os.fsdecode(name) for name in names if isinstance(name, _PATH)]
    values = [text.partition("=")[2] or text for text in texts]  # --out=FOLDER
    found: dict[Path, tuple[float, float]] = {}
    for value in (*values, os.curdir, tempfile.gettempdir(), "/dev/shm"):
        path = Path(value).absolute()
        while not os.path.ismount(path):
            path = path.parent
        usage = shutil.disk_usage(path)
        if usage.total:
            found[path] = (usage.free / 2**30, usage.total / 2**30)
    where = min(found, key=lambda path: found[path])
    return where, *found[where]


def _reader_is_gone() -> bool:
    """True when our own output leads into a pipe that nobody reads any more (and not some worker's pipe)."""
    import select

    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
