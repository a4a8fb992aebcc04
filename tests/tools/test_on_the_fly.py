"""A folder of media where a packed data set is wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmill.tools import cli
from clipmill.tools.on_the_fly import packed


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Pictures of two classes, six of each, dark and light; one file is none."""
    rng = np.random.default_rng(0)
    for number in range(12):
        name = ("dark", "light")[number % 2]
        pixels = rng.integers(0, 100, (40, 48, 3)) + 150 * (number % 2)
        path = tmp_path / "raw" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "raw" / "dark" / "text.png").write_text("no picture")
    return tmp_path / "raw"


def test_evaluate_packs_a_raw_folder_once(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "knn", "random:resnet18:width=0.125", str(raw), "--out", str(tmp_path / "out"), "--json"]
    options = ["--test-fraction", "0.5", "--size", "32", "--frames", "1", "--clips", "1", "--k", "3", "--pictures", "0"]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert cli.main([*words, *options, *cache]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["metrics"]["top1"] >= 0.75
    (folder,) = (tmp_path / "cache" / "packed").iterdir()
    assert f"1 of 13 files cannot be used, see {folder / 'rejects.jsonl'}" in said.err
    stamp = (folder / "index.arrow").stat().st_mtime_ns
    assert cli.main([*words, *options, *cache]) == 0
    assert (folder / "index.arrow").stat().st_mtime_ns == stamp


def test_a_corpus_that_changed_is_packed_anew(raw: Path, tmp_path: Path) -> None:
    first = packed(raw, cache_dir=tmp_path / "cache", quiet=True)
    assert packed(raw, cache_dir=tmp_path / "cache", quiet=True) == first
    os.utime(raw / "dark" / "0.png", (1, 1))
    second = packed(raw, cache_dir=tmp_path / "cache", quiet=True)
    (raw / "dark" / "text.png").unlink()
    third = packed(raw, cache_dir=tmp_path / "cache", quiet=True)
    assert len({first, second, third}) == 3
    assert json.loads((first / "dataset.json").read_text())["counts"]["ok"] == 12


def test_other_folders_come_back_as_they_are(raw: Path, tmp_path: Path) -> None:
    first = packed(raw, cache_dir=tmp_path / "cache", quiet=True)
    (tmp_path / "empty").mkdir()
    for folder in (first, tmp_path / "empty", tmp_path / "nowhere"):
        assert packed(folder, cache_dir=tmp_path / "other", quiet=True) == folder
    assert not (tmp_path / "other").exists()


def test_the_cache_is_where_the_environment_says(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "mine"))
    assert packed(raw, quiet=True).parent == tmp_path / "mine" / "packed"
