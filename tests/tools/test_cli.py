"""The command line: help without imports, near names, one line per error, and exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import clipmill
from clipmill.tools import cli

HEAVY = ("torch", "numpy", "tyro", "rich", "av", "pyarrow")


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipmill.tools.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Puts a command `fake` in the table, whose main is the given function."""

    def make(main, **attributes) -> None:
        module = ModuleType("clipmill.tools.fake")
        module.main = main
        module.parse = lambda argv: argv
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "clipmill.tools.fake", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake", "does something"))

    return make


def raises(error: BaseException):
    def main(args) -> int:
        raise error

    return main


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom clipmill.tools import cli\ncode = cli.main(['--help'])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    start_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    print(f"clipmill --help took {time.perf_counter() - start_s:.3f} s")
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert all(f"\n  {name} " in done.stdout and about in done.stdout for name, (_, about) in cli.COMMANDS.items())


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"clipmill {clipmill.__version__}\n")


def test_no_command_is_wrong_use():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: clipmill COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pak", "unknown command 'pak'; did you mean pack?"),
        ("evalute", "unknown command 'evalute'; did you mean evaluate?"),
        ("--verison", "unknown option '--verison'; did you mean --version?"),
        ("zzz", "unknown command 'zzz'; `clipmill --help` lists the commands"),
    ],
)
def test_an_unknown_command_names_near_ones(word: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"clipmill: error: {said}\n")


def test_options_come_from_args_and_mistakes_in_them_name_near_ones(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", "run", "--ot", "x"]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert "usage: clipmill doctor" in capsys.readouterr().out


def test_a_command_may_read_its_own_line(command, capsys: pytest.CaptureFixture[str]):
    command(lambda args: print(args) or 0, parse=lambda argv: ("parsed", *argv))
    assert cli.main(["fake", "a", "--b"]) == 0
    assert capsys.readouterr().out == "('parsed', 'a', '--b')\n"


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_exit_code_is_the_commands(command, code: int):
    command(lambda args: code)
    assert cli.main(["fake"]) == code


def test_a_command_may_leave_early(command, capsys: pytest.CaptureFixture[str]):
    command(raises(SystemExit(3)))
    assert cli.main(["fake"]) == 3
    command(raises(SystemExit("no such benchmark")))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "clipmill: error: no such benchmark\n"


class OwnError(RuntimeError):
    """As an exception class that a module of clipmill defines."""


OwnError.__module__ = "clipmill.pipeline.loader"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("gop 0 is\n  out of range"), "gop 0 is out of range"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b.csv"), "a/b.csv: No such file or directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", Path("a")), "a: Not a directory"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "[Errno 9] Bad file descriptor: 7"),
        (OSError("plain"), "plain"),
        (ValueError(), "ValueError"),
        (OwnError("too many damaged records"), "too many damaged records"),
        (
            ModuleNotFoundError("No module named 'ray'", name="ray"),
            "the package 'ray' is not installed; `clipmill doctor`",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line(command, capsys: pytest.CaptureFixture[str], error: Exception, said: str):
    command(raises(error))
    assert cli.main(["fake"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"clipmill: error: {said}")
    assert err.count("\n") == 1


def test_the_traceback_shows_on_request(command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    command(raises(ValueError("wrong")))
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["fake"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("clipmill: error: wrong\n")
    monkeypatch.setenv(cli.TRACEBACK, "0")
    assert cli.main(["fake"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), ModuleNotFoundError("x", name="clipmill.x")])
def test_a_fault_of_the_program_keeps_its_traceback(command, error: Exception):
    command(raises(error))
    with pytest.raises(type(error)):
        cli.main(["fake"])


def test_an_interrupt(command, capsys: pytest.CaptureFixture[str]):
    command(raises(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "clipmill: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(command, capsys: pytest.CaptureFixture[str]):
    def main(args) -> int:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
        return 0

    command(main)
    assert cli.main(["fake", "--out=/dev/full"]) == 2
    err = capsys.readouterr().err
    where = cli.fullest_disk(["--out=/dev/full"])[0]
    assert f"no space left on the disk of {where} (" in err
    assert "GiB free" in err


def test_the_fullest_disk_is_that_of_a_named_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    room = {"/": (5, 100), str(tmp_path): (1, 50)}
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in room)
    sizes = {path: type("Usage", (), {"free": f << 30, "total": t << 30}) for path, (f, t) in room.items()}
    monkeypatch.setattr("shutil.disk_usage", lambda path: sizes[str(path)])
    assert cli.fullest_disk([f"--out={tmp_path}/new/run", None, "x" * 5000, "8"]) == (tmp_path, 1.0, 50.0)
    assert cli.fullest_disk([]) == (Path("/"), 5.0, 100.0)


def test_a_closed_reader_is_no_error():
    code = (
        "import sys, types\nfrom clipmill.tools import cli\n"
        "def main(args):\n    for i in range(100000):\n        print('row', i)\n    return 0\n"
        "sys.modules['clipmill.tools.fake'] = types.SimpleNamespace(main=main, parse=list)\n"
        "cli.COMMANDS['fake'] = ('fake', '')\nsys.exit(cli.main(['fake']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"row 0\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, b"")


def test_another_broken_pipe_is_an_error(command, capsys: pytest.CaptureFixture[str]):
    command(raises(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert cli.main(["fake"]) == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself(name: str):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: clipmill {name}" in done.stdout
