from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipmill.models.encoder import InputSpec, build_encoder, save_encoder
from clipmill.pipeline.record import ShardIndex
from clipmill.tools import cli
from clipmill.tools.evaluate.command import main, parse

QUICK = ["--clips", "1", "--threads", "1", "--processes", "0", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with an encoder, as `clipmill pretrain` leaves it."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width=0.125)
    encoder.spec = InputSpec(num_frames=2, size=32)
    save_encoder(encoder, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_folder_collects_its_scores(run: Path, bright: ShardIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "knn", str(run), str(bright.root), "--k", "3", "--pictures", "1", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "top1" in printed
    assert printed.rstrip().endswith("score.json")
    features = sorted((run / "evaluate" / "features").rglob("*.safetensors"))
    assert len(features) == 2
    stamps = [path.stat().st_mtime_ns for path in features]
    options = ["--weight-decays", "0.01", "--json"]
    assert cli.main(["evaluate", "linear", str(run), str(bright.root), *options, *QUICK]) == 0
    assert sorted((run / "evaluate" / "features").rglob("*.safetensors")) == features
    assert [path.stat().st_mtime_ns for path in features] == stamps
    stored = json.loads((run / "evaluate" / "linear" / "score.json").read_text())
    assert json.loads(capsys.readouterr().out) == stored
    assert stored["benchmark"] == "linear"
    assert stored["settings"]["encoder"] == str(run)
    assert stored["settings"]["config"]["weight_decays"] == [0.01]
    assert stored["digests"]["data"] == bright.digest
    for name in ("knn", "linear"):
        folder = run / "evaluate" / name
        score = json.loads((folder / "score.json").read_text())
        assert all((folder / artefact).is_file() for artefact in score["artefacts"])


def test_untrained_encoders_need_a_place(run: Path, bright: ShardIndex, tmp_path: Path) -> None:
    command = ["linear", f"random:{run}", str(bright.root), "--weight-decays", "0.01", *QUICK]
    with pytest.raises(ValueError, match="has no run folder; say with --out"):
        main(parse(command))
    assert main(parse([*command, "--out", str(tmp_path / "out")])) == 0
    score = json.loads((tmp_path / "out" / "score.json").read_text())
    assert score["settings"]["encoder"] == f"random:{run}"
    assert (tmp_path / "out" / "features").is_dir()
    assert not (run / "evaluate").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["knnn", "run", "data"], "unknown benchmark 'knnn'; did you mean knn"),
        (["knn", "nowhere", "data"], "nowhere: no such folder"),
        (["knn", "random:resnet18:width=0.125", "nowhere", "--out", "x"], "nowhere: no index.arrow there"),
        (["knn", "random:resnet18:width=0.125", "data"], "say with --out where the score goes"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_option_values_out_of_range(run: Path, bright: ShardIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "knn", str(run), str(bright.root), "--clips", "0"]) == 2
    assert "clips must be at least 1, got 0" in capsys.readouterr().err
    assert not (run / "evaluate").exists()


def test_help_lists_the_benchmarks_without_torch() -> None:
    code = (
        "import sys; from clipmill.tools import cli; code = cli.main(['evaluate', '--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("knn", "linear", "finetune"):
        assert f"\n  {name}" in done.stdout


def test_help_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["finetune", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--epochs", "--encoder-lr-scale", "--clips", "--test-fraction", "--precision"):
        assert option in printed
    with pytest.raises(SystemExit) as stop:
        parse([])
    assert stop.value.code == 2
