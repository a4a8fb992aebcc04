"""The README's commands and code, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from clipmill.tools import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::DeprecationWarning:clipmill"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every line of the tour was run."""
    folder = tmp_path_factory.mktemp("tour")
    tour = [line.split() for block in blocks("sh") for line in block.splitlines() if line.startswith("clipmill ")]
    assert len(tour) >= 8
    for name, *words in tour:
        assert name == "clipmill"
        run([sys.executable, "-m", "clipmill.tools.cli", *words], folder)
    return folder


def test_the_tour_leaves_what_it_says(toured: Path) -> None:
    for name in ("shards/index.arrow", "inspected/index.html", "run/encoder.safetensors", "run/report.html"):
        assert (toured / name).is_file(), name
    assert (toured / "run/evaluate/linear/score.json").is_file()
    assert (toured / "weights/encoder.safetensors").is_file()


def test_the_code_runs(toured: Path) -> None:
    code = blocks("python")
    assert code
    for number, text in enumerate(code):
        path = toured / f"example_{number}.py"
        path.write_text(f"if __name__ == '__main__':\n{re.sub('^', '    ', text, flags=re.MULTILINE)}", "utf-8")
        run([sys.executable, str(path)], toured)


def test_commands_for_other_machines_are_understood() -> None:
    """They need a cluster or a store; what they do is tested elsewhere, here that they are spelt right."""
    text = README.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    lines = [line.partition(" #")[0].split() for line in commands if "->" not in line]
    words = [line[line.index("clipmill.tools.cli") :] if "clipmill.tools.cli" in line else line for line in lines]
    ours = [line[1:] for line in words if line[0] in ("clipmill", "clipmill.tools.cli")]
    assert {line[0] for line in ours} >= {"pack", "pretrain", "verify"}
    for name, *options in ours:
        module = import_module(f"clipmill.tools.{cli.COMMANDS[name][0]}")
        assert module.parse(options) if hasattr(module, "parse") else tyro.cli(module.Args, args=options)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    lines = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
    targets = [words[1] for words in lines if words[:1] == ["make"]]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8")):
        assert (ROOT / target).exists(), target
