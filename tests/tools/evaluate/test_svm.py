from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.svm import Config, choose, evaluate, squared_hinge
from clipmill.tools.evaluate.views import Views


def blobs(count: int = 60, classes: int = 3, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = np.arange(count) % classes
    return rng.normal(size=(count, width)) + 1.5 * rng.normal(size=(classes, width))[label], label


def objective(x: np.ndarray, label: np.ndarray, coef: np.ndarray, cost: float) -> np.ndarray:
    sign = np.where(label[:, None] == np.arange(coef.shape[1]), 1.0, -1.0)
    slack = np.maximum(0, 1 - sign * (x @ coef))
    return (coef**2).sum(0) / 2 + cost * (slack**2).sum(0)


@pytest.mark.parametrize("cost", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_no_other_weights_are_better(cost: float, scale: float) -> None:
    x, label = blobs()
    x = scale * x
    coef = squared_hinge(x, label, 3, cost)
    sign = np.where(label[:, None] == np.arange(3), 1.0, -1.0)
    pull = 2 * cost * x.T @ (sign * np.maximum(0, 1 - sign * (x @ coef)))
    np.testing.assert_allclose(coef, pull, rtol=0, atol=1e-8 * np.abs(2 * cost * x.T @ sign).max())  # no slope is left
    best, rng = objective(x, label, coef, cost), np.random.default_rng(1)
    for _ in range(20):
        change = np.abs(coef).max() * rng.normal(size=coef.shape)
        assert (objective(x, label, coef + change, cost) > best).all()


def test_more_features_than_records_and_absent_classes() -> None:
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(10, 40)).astype(np.float32), np.arange(10) % 2
    coef = squared_hinge(x, label, 3, 100.0)
    assert coef.shape == (40, 3)
    np.testing.assert_array_equal((x @ coef)[:, :2].argmax(1), label)
    np.testing.assert_allclose(coef[:, 0], -coef[:, 1], rtol=1e-6)  # two classes mirror each other without a bias
    assert ((x @ coef)[:, 2] < 0).all()


def test_the_cost_is_chosen_on_the_held_out_part() -> None:
    x, label = blobs()
    held = np.arange(60) % 4 == 0
    config = Config(costs=(1.0, 1e-3))
    cost, tried = choose(x, label, held, 3, config)
    assert [row["cost"] for row in tried] == [1e-3, 1.0]
    for row in tried:
        coef = squared_hinge(x[~held], label[~held], 3, row["cost"])
        assert row["top1"] == pytest.approx(((x[held] @ coef).argmax(1) == label[held]).mean())
    assert cost == next(row["cost"] for row in tried if row["top1"] == max(row["top1"] for row in tried))
    assert choose(x, label, held, 3, Config(costs=(7.0,))) == (7.0, [])
    with pytest.raises(ValueError, match="60 training records are too few to hold out"):
        choose(x, label, np.zeros(60, bool), 3, config)


@pytest.mark.parametrize("average", ["features", "moments"])
def test_a_report(bright: ShardIndex, colour: Any, compute: Compute, tmp_path: Path, average: Any) -> None:
    views = Views(clips=2, size=16, spacing="rounded")
    config = Config(costs=(1.0, 100.0), scaling="standard", average=average, held_out=0.3, views=views, compute=compute)
    report = evaluate(colour, bright.root, tmp_path, config)
    assert report.benchmark == "svm"
    assert report.metrics["train_top1"] > 0.6
    assert set(report.metrics) == {"top1", "mean_class_accuracy", "train_top1"}
    assert report.settings["chosen"]["cost"] in (1.0, 100.0)
    assert len(report.settings["tried"]) == 2
    assert report.to_json() == evaluate(colour, bright.root, tmp_path, config).to_json()


def test_options_that_cannot_be(bright: ShardIndex, colour: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"costs must be positive numbers, got \(0.0,\)"):
        Config(costs=(0.0,))
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
        Config(held_out=1.0)
    with pytest.raises(ValueError, match="moments needs at least 2 views of time per record, got 1"):
        evaluate(colour, bright.root, tmp_path, Config(average="moments", views=Views(clips=1)))
