"""The report: what it shows of whole, broken and missing run folders, alone and side by side."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmill.tools import cli, runs
from clipmill.tools.report import Args, main

STAGES = {"plan_s": 0.1, "read_s": 0.2, "decode_s": 1.5, "copy_s": 0.2, "augment_s": 0.5, "step_s": 1.0, "wait_s": 0.5}


def write_run(folder: Path, lr: float = 0.1, steps: int = 30, **config: Any) -> Path:
    """A run folder as `pretrain` leaves it."""
    folder.mkdir(parents=True)
    resolved = {"method": "moco", "config": {"queue": 512, "encoder": {"name": "r3d_18"}}, "train": {"lr": lr}}
    (folder / "run.json").write_text(json.dumps(resolved | config))
    rows = [
        {"step": 10 * i, "epoch": i // 10, "loss": 5.0 / i, "lr": lr, "clips_per_s": 90.0 + i, "wait_share": 0.25}
        | {"accuracy": i / 100, "note": "text"}
        | STAGES
        for i in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_score(run: Path, name: str, folder: str = "", **more: Any) -> Path:
    out = run / "evaluate" / (folder or name)
    out.mkdir(parents=True)
    score = {
        "benchmark": name,
        "metrics": {"top1": 0.4321, "top5": 0.9},
        "settings": {"k": 20},
        "digests": {"data": "d1"},
    }
    (out / "score.json").write_text(json.dumps(score | more))
    return out


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def report(*folders: Path, out: Path | None = None) -> str:
    assert main(Args(runs=folders, out=out)) == 0
    return (out or folders[0] / "report.html").read_text("utf-8")


def words(page: str) -> str:
    """The visible text, without the style sheet."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "moco-1")
    picture(run / "samples" / "query.png")
    out = write_score(run, "knn", rows=[{"class": "a<b", "top1": 0.25}], artefacts=["confusion.png", "features.csv"])
    picture(out / "confusion.png", 90)
    (out / "features.csv").write_text("x")
    page = report(run)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    text = words(page)
    for part in ("Overview", "Scores", "Curves", "Throughput", "Sampled views", "Configuration"):
        assert f" {part} " in text
    assert " top1 " in text
    assert " 0.4321 " in text
    assert " a&lt;b " in text
    assert "features.csv" in text
    assert " config.encoder.name r3d_18 " in text
    assert page.count("data:image/png;base64") == 2
    for curve in ("loss", "lr", "clips_per_s", "wait_share", "accuracy"):
        assert f"<h3>{curve}</h3>" in page
    assert "<h3>note</h3>" not in page
    assert "<h3>decode_s</h3>" not in page
    assert "missing" not in text


def test_the_waterfall_adds_up(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=30)
    page = report(run)
    text = words(page)
    assert "Training loop, 60.0 s" in text
    assert " wait 15.0 s, 25 % augment 15.0 s, 25 % step 30.0 s, 50 %" in text
    assert " decode 45.0 s, 75 % " in text
    assert "waits 25.0 % of its time for data; most of the work ahead is decode" in text
    bars = re.findall(r"margin-left:([\d.]+)%;width:([\d.]+)%", page)
    assert [(float(a), float(b)) for a, b in bars[:3]] == [(0, 25), (25, 25), (50, 50)]


def test_runs_side_by_side(tmp_path: Path):
    first, second = write_run(tmp_path / "a", lr=0.1), write_run(tmp_path / "b", lr=0.3)
    published = [{"method": "MoCo", "top1": 0.482, "source": "Chen et al. 2020"}]
    write_score(first, "knn", published=published)
    write_score(second, "knn", settings={"k": 5}, metrics={"top1": 0.5, "map": 0.1}, published=published)
    write_score(second, "linear")
    page = report(first, second, out=tmp_path / "both.html")
    text = words(page)
    assert " top1 top5 map source a 0.4321 0.9 – measured b 0.5 – 0.1 measured MoCo 0.482 – – Chen et al. 2020 " in text
    assert "these settings differ between the runs: k" in text
    assert "these digests" not in text
    assert "Options that differ option a b train.lr 0.1 0.3" in text
    loss = page[page.index("<h3>loss</h3>") :]
    assert (
        len(re.findall(r'<path class="line c\d" stroke-dasharray="[\d ]*" d="M[^"]*">', loss.split("</svg>")[0])) == 2
    )


def test_two_scores_of_one_benchmark_are_told_apart(tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_score(run, "knn")
    write_score(run, "knn", folder="knn-random", metrics={"top1": 0.125})
    assert " run 0.4321 0.9 measured run (knn-random) 0.125 – measured " in words(report(run))


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    first, second = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    text = words(report(first, second, out=tmp_path / "page.html"))
    assert f" {first} " in text
    assert f" {second} " in text


def test_a_half_written_last_line_is_tolerated_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", steps=12)
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 130, "lo')
    text = words(report(run))
    assert "log.jsonl: line 13 is half-written and was left out" in text
    assert "line 13 is half-written" in capsys.readouterr().out
    assert " steps 120 " in text


def test_rows_logged_again_after_a_resume_count_once(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=3)
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 20, "loss": 7.5}\nnot json\n{"loss": 1}\n{"step": 40, "loss": null}\n')
    found = runs.read_run(run, "run")
    steps, losses = found.series("loss")
    assert steps == [10, 20, 30, 40]
    assert losses[1] == 7.5
    assert math.isnan(losses[3])
    assert [problem.split(":")[1] for problem in found.problems if problem.startswith("log.jsonl")] == [
        " line 5 is damaged and was left out",
        " line 6 is damaged and was left out",
        " 1 steps were logged again after a resume; the later rows are shown",
    ]


@pytest.mark.parametrize("lost", ["run.json", "log.jsonl"])
def test_a_missing_part_is_shown_as_missing(tmp_path: Path, lost: str):
    run = write_run(tmp_path / "run")
    (run / lost).unlink()
    text = words(report(run))
    assert f"{lost} is missing" in text
    assert "no scores yet; run `clipmill evaluate`" in text
    assert "samples/*.png is missing" in text


def test_a_folder_with_scores_alone_is_reported(tmp_path: Path):
    write_score(tmp_path / "random", "linear")
    text = words(report(tmp_path / "random"))
    assert " 0.4321 " in text
    assert "run.json is missing" in text


def test_damaged_parts_are_told(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("[1, 2")
    (run / "samples").mkdir()
    (run / "samples" / "bad.png").write_bytes(b"\x89PNG nothing")
    write_score(run, "knn", metrics="much", rows=3, artefacts={"a": 1}, settings=[1], published=[5, {"value": 1}])
    (write_score(run, "linear") / "score.json").write_text("{")
    text = words(report(run))
    assert "run.json in run is damaged" in text
    assert "score.json in linear is damaged" in text
    assert "bad.png cannot be read" in text


def test_artefacts_stay_inside_their_folder(tmp_path: Path):
    run = write_run(tmp_path / "run")
    picture(tmp_path / "secret.png", 77)
    (run / "evaluate").mkdir()
    write_score(run, "knn", artefacts=["../../../secret.png", str(tmp_path / "secret.png"), "gone.png"])
    page = report(run)
    assert "data:image" not in page
    assert "missing artefacts: ../../../secret.png" in words(page)


def test_a_large_picture_is_made_smaller(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1000, 4000, 3), np.uint8)
    Image.fromarray(noise).save(run / "samples" / "wide.png")
    assert len(report(run)) < (run / "samples" / "wide.png").stat().st_size / 2


def test_numbers_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", steps=4)
    write_score(run, "knn")
    assert cli.main(["report", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(run / "report.html")
    assert told["runs"][0]["last"]["step"] == 40
    assert told["runs"][0]["seconds"]["decode_s"] == pytest.approx(6.0)
    assert told["runs"][0]["scores"] == {"knn": {"top1": 0.4321, "top5": 0.9}}


def test_several_runs_go_to_the_current_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(Args(runs=tuple(folders))) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "not a folder; give run folders of `clipmill pretrain`"),
        (lambda path: path.mkdir(), "is it a run folder?"),
        (lambda path: path.write_text("x"), "not a folder"),
    ],
)
def test_what_is_no_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], make, said: str):
    make(tmp_path / "thing")
    assert cli.main(["report", str(tmp_path / "thing"), "--out", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert str(tmp_path / "thing") in err
    assert not (tmp_path / "r.html").exists()


def test_no_run_at_all_is_wrong_use(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report"]) == 2
    assert "run folder" in capsys.readouterr().err
