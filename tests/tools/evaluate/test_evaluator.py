from __future__ import annotations

import json
from dataclasses import is_dataclass
from inspect import signature
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clipmill.tools.evaluate import evaluator
from clipmill.tools.evaluate.evaluator import Report, benchmark_module, benchmarks, write_atomic, write_csv

REPORT = Report(
    benchmark="knn",
    metrics={"top1": 0.25, "records": np.float64(8)},  # type: ignore[dict-item]
    rows=[{"class": "a", "top1": 0.5}, {"class": "b", "top1": 0.0}],
    artefacts=["samples.csv"],
    settings={"config": {"cache": Path("x"), "lrs": (0.1, 0.2)}},
    digests={"data": "00ff"},
    published=[{"source": "someone", "top1": 0.7}],
)


def test_a_score_file_has_the_documented_form(tmp_path: Path) -> None:
    path = REPORT.save(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "score.json"
    assert json.loads(path.read_text()) == {
        "benchmark": "knn",
        "metrics": {"top1": 0.25, "records": 8.0},
        "rows": [{"class": "a", "top1": 0.5}, {"class": "b", "top1": 0.0}],
        "artefacts": ["samples.csv"],
        "settings": {"config": {"cache": "x", "lrs": [0.1, 0.2]}},
        "digests": {"data": "00ff"},
        "published": [{"source": "someone", "top1": 0.7}],
    }
    assert [item.name for item in path.parent.iterdir()] == ["score.json"]


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knn: the metric 'top1' is nan"):
        Report(benchmark="knn", metrics={"top1": float("nan")}).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "score.json"
    write_atomic(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluator.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["score.json"]


def test_tables_quote_what_needs_it(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [{"key": 'a,"b"', "n": 1}, {"key": "c\udcff", "n": 2}])
    assert (tmp_path / "rows.csv").read_bytes() == b'key,n\n"a,""b""",1\nc\xff,2\n'


def test_printing_shows_metrics_rows_and_literature() -> None:
    console = Console(file=StringIO(), width=80)
    REPORT.show(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "top1" in text
    assert "0.2500" in text
    assert "class" in text
    assert "published: source someone, top1 0.7" in text


def test_benchmarks_are_found_without_importing_them() -> None:
    found = benchmarks()
    assert {"knn", "linear", "finetune"} <= set(found)
    assert not {"evaluator", "features", "views", "command"} & set(found)
    for name, about in found.items():
        assert about.endswith(".")
        module = benchmark_module(name)
        assert is_dataclass(module.Config)
        assert module.Config.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert list(signature(module.evaluate).parameters) == ["encoder", "root", "out", "config", "progress"]
        assert module.Config() == module.Config()


def test_an_unknown_benchmark_lists_near_ones() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'liner'; did you mean linear"):
        benchmark_module("liner")
    with pytest.raises(ValueError, match=r"unknown benchmark 'zzz'; did you mean .*knn"):
        benchmark_module("zzz")
