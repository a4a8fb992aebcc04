from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.dense import Dense
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.localisation import Config, evaluate
from clipmill.tools.evaluate.localisation_files import read_results, read_truth, write_results

FPS = 25


@pytest.fixture(scope="module")
def corpus(
    make_dataset: Callable[..., ShardIndex], frame_level: Callable[[int, int], int], tmp_path_factory
) -> ShardIndex:
    """12 grey videos of about 100 frames, annotated where they are bright, which is a run of frames or two."""
    root = tmp_path_factory.mktemp("untrimmed")
    index = make_dataset(root, num_records=12, num_frames=96, size=(16, 16), fps=FPS, audio=False)
    database = {}
    for number in range(12):
        frames = index[number].num_frames
        bright = np.array([frame_level(number, frame) > 130 for frame in range(frames)])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], bright, [0]])))
        rows = [
            {"segment": [start / FPS, end / FPS], "label": "even" if number % 2 == 0 else "odd"}
            for start, end in edges.reshape(-1, 2).tolist()
        ]
        subset = "validation" if number % 3 == 0 else "training"
        database[f"v_{number}"] = {"duration": frames / FPS, "subset": subset, "annotations": rows}
    database["elsewhere"] = {"duration": 3.0, "subset": "validation", "annotations": database["v_1"]["annotations"]}
    (root / "annotations.json").write_text(json.dumps({"database": database, "version": "VERSION 1.3"}))
    return index


@pytest.fixture
def config(compute: Compute) -> Config:
    return Config(
        interval=4,
        points=16,
        samples=4,
        widths=(12, 12, 8),
        groups=3,
        epochs=60,
        milestone=50,
        lr=1e-2,
        train_batch=4,
        dense=Dense(frames=1, stride=1),
        compute=compute,
    )


def test_bright_parts_are_proposed(corpus: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    report = evaluate(colour, corpus.root, tmp_path, config)
    assert colour.seen == sum(len(range(2, 96 + number, 4)) for number in range(12))
    untrained = evaluate(colour, corpus.root, tmp_path / "untrained", replace(config, epochs=1, lr=1e-9))
    assert report.metrics["ar@5"] > untrained.metrics["ar@5"] + 10
    assert report.metrics["ar@1"] <= report.metrics["ar@5"] <= report.metrics["ar@10"] <= report.metrics["ar@100"]
    assert report.metrics["map@0.5"] >= report.metrics["map@0.75"] >= report.metrics["map@0.95"]
    assert report.metrics["unknown_detections"] == 0
    assert report.settings["missing_videos"] == 1
    assert report.settings["test_videos"] == 4
    assert {row["class"] for row in report.rows} == {"even", "odd"}
    assert report.artefacts == ["proposals.json", "average_recall.csv", "detections.json"]
    with (tmp_path / "average_recall.csv").open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["average_recall"]) == pytest.approx(
            report.metrics["ar@100"], rel=1e-4
        )
    found = read_results(tmp_path / "detections.json")
    labels, segments, scores = found["0"]
    assert set(labels) == {"even", "odd"}
    assert np.all(np.diff(scores) <= 0)
    assert segments.min() >= 0
    assert segments.max() <= 96 / FPS
    again = evaluate(None, corpus.root, tmp_path / "again", replace(config, score_only=tmp_path))
    # the fifth video of the subset is not in the data set: nothing was found in it
    assert again.settings["test_videos"] == 5
    assert again.metrics["ar@100"] == pytest.approx(0.8 * report.metrics["ar@100"])
    assert again.artefacts == ["average_recall.csv"]


def test_exported_features_give_the_same(corpus: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    config = replace(config, epochs=1)
    first = evaluate(colour, corpus.root, tmp_path, replace(config, export=True))
    head, *rows = (tmp_path / "features" / "v_3.csv").read_text().splitlines()
    assert head == "f0,f1,f2"
    assert len(rows) == 16
    assert all(len(value.partition(".")[2]) == 4 for value in rows[0].split(","))
    files = tmp_path / "features"
    second = evaluate(colour, corpus.root, tmp_path / "b", replace(config, features=files, interval=1000))
    # without frame numbers features cover the whole duration, not the 24 x 4 frames of whole intervals
    assert second.metrics["ar@100"] == pytest.approx(first.metrics["ar@100"], abs=15)
    assert second.settings["missing_videos"] == 1


def test_perfect_results_score_100(corpus: ShardIndex, config: Config, tmp_path: Path) -> None:
    truth = {name: one for name, one in read_truth(corpus.root / "annotations.json").items() if one.subset == "val"}
    rows = {
        name: [
            {"label": label, "score": 1.0, "segment": segment}
            for label, segment in zip(one.labels.tolist(), one.segments.tolist(), strict=True)
        ]
        for name, one in truth.items()
    }
    for file in ("proposals.json", "detections.json"):
        write_results(tmp_path / file, rows)
    report = evaluate(None, corpus.root, tmp_path / "out", replace(config, score_only=tmp_path))
    assert report.metrics["map"] == pytest.approx(100)
    assert report.metrics["ar@100"] == pytest.approx(100)
    (tmp_path / "proposals.json").unlink()
    report = evaluate(None, corpus.root, tmp_path / "out", replace(config, score_only=tmp_path))
    assert list(report.metrics) == ["map", "map@0.5", "map@0.75", "map@0.95", "unknown_detections"]


def test_mmaction_annotations_take_the_subset_from_the_name(tmp_path: Path) -> None:
    entry = {"duration_second": 9.5, "duration_frame": 285, "annotations": [{"segment": [1, 2], "label": "run"}]}
    (tmp_path / "anet_anno_val.json").write_text(json.dumps({"v_abc": entry}))
    (tmp_path / "anet_anno_train.json").write_text(json.dumps({"v_def": entry}))
    truth = read_truth(*sorted(tmp_path.glob("*.json")))
    assert {name: one.subset for name, one in truth.items()} == {"abc": "val", "def": "train"}
    assert (truth["abc"].duration_s, truth["abc"].num_frames) == (9.5, 285)
    assert truth["abc"].segments.tolist() == [[1, 2]]


def test_wrong_files_are_one_clear_error(corpus: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    def fails(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(colour, corpus.root, tmp_path / "out", replace(config, **changes))

    fails("no video of subset 'test' has segments; the annotations have train, val", test="test")
    fails("neither proposals.json nor detections.json there", score_only=tmp_path)
    fails("no features v_ID.csv of any annotated video", features=tmp_path)
    file = tmp_path / "a.json"
    entry = {"annotations": [{"segment": [0, 1], "label": "run"}]}
    for text, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got a list"),
        ('{"database": {"a": {"annotations": [{"segment": [1]}]}}}', "video 'a' is not annotated with segments"),
        (json.dumps({"zz": entry | {"subset": "train"}, "v_yy": entry | {"subset": "val"}}), "no record has the id"),
    ):
        file.write_text(text)
        fails(message, annotations=(file,))
    fails("training and test subset are both 'val'", train="val")
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        replace(config, points=0)
    with pytest.raises(ValueError, match="--every is set by --interval"):
        replace(config, dense=Dense(every=2))
