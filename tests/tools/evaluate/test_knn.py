from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.knn import Config, evaluate, vote
from clipmill.tools.evaluate.views import Views


def test_votes_are_weighted_by_similarity() -> None:
    labels = np.array([[0, 1, 1], [2, 2, 2]])
    similarity = np.array([[0.9, 0.8, 0.7], [0.3, 0.2, 0.1]])
    shares = vote(labels, similarity, 3, temperature=0.1)
    weights = np.exp(similarity[0] / 0.1)
    np.testing.assert_allclose(shares[0], [weights[0] / weights.sum(), weights[1:].sum() / weights.sum(), 0])
    np.testing.assert_allclose(shares[1], [0, 0, 1])
    assert shares[0].argmax() == 0  # e^9 > e^8 + e^7
    assert vote(labels, similarity, 3, temperature=1.0)[0].argmax() == 1
    assert np.isfinite(vote(labels, similarity, 3, temperature=1e-4)).all()


@pytest.fixture
def config(compute: Compute) -> Config:
    # one grey level fills one line through the origin of colour space, so only centred features tell levels apart
    return Config(k=4, centre=True, pictures=2, views=Views(clips=2, size=16), compute=compute)


def test_separable_classes_are_all_found(bright: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    report = evaluate(colour, bright.root, tmp_path, config)
    assert report.benchmark == "knn"
    assert report.metrics["r@10"] == 1.0
    assert report.metrics["top1"] > 0.6
    assert list(report.metrics) == ["top1", "mean_class_accuracy", "r@1", "r@5", "r@10"]
    assert report.artefacts == ["samples.csv", "confusion.png", "neighbours.png"]
    for name in report.artefacts[1:]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 3
    assert sum(row["records"] for row in report.rows) == 8
    assert report.digests["train"] == bright.split("train").digest
    assert report.settings["k_used"] == 4
    assert report.settings["views_per_record"] == 2
    assert (report.settings["train_records"], report.settings["test_records"]) == (16, 8)
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == bright.split("test").column("key").tolist()
    assert np.mean([int(row["correct"]) for row in rows]) == report.metrics["top1"]
    assert {row["class"] for row in rows} == {"dark", "grey", "light"}


def test_rows_and_metrics_agree(bright: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    report = evaluate(colour, bright.root, tmp_path, config)
    hits = sum(row["top1"] * row["records"] for row in report.rows)
    assert hits / 8 == pytest.approx(report.metrics["top1"])
    present = [row["top1"] for row in report.rows]
    assert np.mean(present) == pytest.approx(report.metrics["mean_class_accuracy"])


def test_the_same_report_twice_and_from_the_cache(
    bright: ShardIndex, colour: Any, config: Config, tmp_path: Path
) -> None:
    first = evaluate(colour, bright.root, tmp_path, config)
    pictures = [(tmp_path / name).read_bytes() for name in first.artefacts]
    colour.seen = 0
    second = evaluate(colour, bright.root, tmp_path, config)
    assert colour.seen == 0
    assert second.to_json() == first.to_json()
    assert [(tmp_path / name).read_bytes() for name in first.artefacts] == pictures


def test_labels_of_the_test_split_change_nothing_but_the_score(
    bright: ShardIndex, relabel: Callable[..., ShardIndex], colour: Any, config: Config, tmp_path: Path
) -> None:
    evaluate(colour, bright.root, tmp_path / "a", config)
    labels = np.where(bright.column("split") == "test", 2 - bright.column("label"), bright.column("label"))
    other = relabel(bright, tmp_path / "data", labels, bright.column("split"), bright.classes)
    evaluate(colour, other.root, tmp_path / "b", config)
    predicted = []
    for folder in ("a", "b"):
        with (tmp_path / folder / "samples.csv").open(newline="") as file:
            predicted.append([row["predicted"] for row in csv.DictReader(file)])
    assert predicted[0] == predicted[1]


def test_sound_alone(make_dataset: Callable[..., ShardIndex], mel: Any, compute: Compute, tmp_path: Path) -> None:
    index = make_dataset(tmp_path / "data", num_records=9, num_frames=8, classes=2)
    config = Config(k=3, pictures=1, views=Views(clips=1), compute=compute)
    report = evaluate(mel, index.root, tmp_path / "out", config)
    assert (tmp_path / "out" / "neighbours.png").is_file()
    assert report.settings["test_records"] == 3


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="k must be at least 1 and temperature positive, got 0 and"):
        Config(k=0)
