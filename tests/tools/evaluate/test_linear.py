from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clipmill.models.encoder import build_encoder
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.features import Compute, Features
from clipmill.tools.evaluate.linear import Config, choose, evaluate, fit, held_out
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import topk_accuracy

CPU = Compute(device="cpu")


def blobs(count: int, seed: int, views: int = 1, noise: float = 1.0) -> Features:
    """Four Gaussian classes in 6 dimensions of different scales; centres do not depend on ``seed``."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 4
    centre = np.random.default_rng(99).normal(size=(4, 6)) * 2
    x = centre[label][:, None] + noise * rng.normal(size=(count, views, 6))
    scale = np.array([1, 10, 0.1, 1, 100, 0.01])
    return Features(
        feature=(x * scale + 5 * scale).astype(np.float32),
        label=label.astype(np.int64),
        uid=rng.integers(0, 1 << 62, count).astype(np.uint64),
    )


def test_lbfgs_finds_the_minimum_that_scikit_learn_finds() -> None:
    seen, unseen = blobs(200, 1), blobs(100, 2)
    for weight_decay in (1e-3, 1e-1):
        probe = fit(seen, 4, Config(compute=CPU, epochs=200), 0.1, weight_decay)
        x = (seen.mean - seen.mean.mean(0)) / seen.mean.std(0)
        oracle = LogisticRegression(C=1 / (200 * weight_decay), max_iter=2000, tol=1e-8).fit(x, seen.label)
        x_new = (unseen.mean - seen.mean.mean(0)) / seen.mean.std(0)
        logits = probe.scores(unseen, "features")
        centred = logits - logits.mean(1, keepdims=True)
        np.testing.assert_allclose(centred, oracle.decision_function(x_new), atol=0.02)


def test_sgd_gets_as_far() -> None:
    seen, unseen = blobs(400, 1), blobs(300, 2)
    exact = fit(seen, 4, Config(compute=CPU), 0.1, 1e-3).scores(unseen, "features")
    config = Config(compute=CPU, solver="sgd", epochs=60, train_batch=64)
    rough = fit(seen, 4, config, 0.1, 1e-3).scores(unseen, "features")
    accuracy = [topk_accuracy(scores, unseen.label, 1) for scores in (exact, rough)]
    assert min(accuracy) > 0.9
    assert abs(accuracy[0] - accuracy[1]) < 0.02
    again = fit(seen, 4, config, 0.1, 1e-3).scores(unseen, "features")
    np.testing.assert_array_equal(again, rough)
    assert (fit(seen, 4, replace(config, seed=1), 0.1, 1e-3).scores(unseen, "features") != rough).any()


def test_moments_see_what_only_the_change_over_time_tells() -> None:
    """Two classes with the same mean feature; one of them varies from view to view."""
    rng = np.random.default_rng(0)
    label = np.arange(200) % 2
    x = rng.normal(size=(200, 1, 4)) + label[:, None, None] * rng.normal(size=(200, 6, 4))
    x -= x.mean(1, keepdims=True) - rng.normal(size=(200, 1, 4))
    features = Features(feature=x.astype(np.float32), label=label, uid=np.arange(200, dtype=np.uint64))
    top1 = {}
    for average in ("features", "moments"):
        probe = fit(features, 2, Config(compute=CPU, average=average), 0.1, 1e-3)
        top1[average] = topk_accuracy(probe.scores(features, average), label, 1)
    assert top1["features"] < 0.7
    assert top1["moments"] > 0.95


def test_moments_need_more_than_one_moment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 views of time per record, got clips = 1"):
        evaluate(
            build_encoder("resnet18", width=0.125), tmp_path, tmp_path, Config(average="moments", views=Views(clips=1))
        )


def test_standardised_features_have_no_units() -> None:
    seen, unseen = blobs(200, 1), blobs(100, 2)
    factor, shift = np.float32([3, 1, 0.2, 7, 1, 9]), np.float32([1, -2, 0, 4, 0, 0])
    moved = [replace(part, feature=part.feature * factor + shift) for part in (seen, unseen)]
    for scaling, same in (("standard", True), ("none", False)):
        config = Config(compute=CPU, scaling=scaling)  # type: ignore[arg-type]
        scores = fit(seen, 4, config, 0.1, 0.1).scores(unseen, "features")
        other = fit(moved[0], 4, config, 0.1, 0.1).scores(moved[1], "features")
        assert np.allclose(scores, other, atol=0.02) == same


def test_a_constant_feature_does_no_harm() -> None:
    seen = blobs(80, 1)
    seen.feature[:, :, 3] = 7.25
    scores = fit(seen, 4, Config(compute=CPU), 0.1, 1e-3).scores(seen, "features")
    assert np.isfinite(scores).all()
    assert topk_accuracy(scores, seen.label, 1) > 0.9


@pytest.mark.parametrize("average", ["prob", "score"])
def test_views_can_vote_instead_of_being_averaged(average: Any) -> None:
    seen, unseen = blobs(200, 1, views=5, noise=4.0), blobs(200, 2, views=5, noise=4.0)
    config = Config(compute=CPU, average=average)
    probe = fit(seen, 4, config, 0.1, 1e-2)
    votes = probe.scores(unseen, average)
    single = probe.scores(replace(unseen, feature=unseen.feature[:, :1]), average)
    assert votes.shape == (200, 4)
    if average == "prob":
        np.testing.assert_allclose(votes.sum(1), 1.0, rtol=1e-5)
    assert topk_accuracy(votes, unseen.label, 1) > topk_accuracy(single, unseen.label, 1) + 0.05
    if average == "score":  # scores are linear in the features, so it does not matter which is averaged
        np.testing.assert_allclose(votes, probe.scores(unseen, "features"), atol=1e-3)


def test_what_is_held_out_has_every_class_and_ignores_the_order() -> None:
    features = blobs(100, 1)
    mask = held_out(features, 0.2)
    assert np.bincount(features.label[mask]).tolist() == [5, 5, 5, 5]
    order = np.random.default_rng(3).permutation(100)
    moved = Features(feature=features.feature[order], label=features.label[order], uid=features.uid[order])
    np.testing.assert_array_equal(held_out(moved, 0.2), mask[order])


def test_the_better_option_is_chosen_on_the_held_out_part() -> None:
    features = blobs(120, 1, noise=3.0)
    config = Config(compute=CPU, weight_decays=(1e-2, 50.0, 1e4))
    (lr, weight_decay), tried = choose(features, 4, config)
    assert (lr, weight_decay) == (0.1, 1e-2)
    assert [row["weight_decay"] for row in tried] == [1e-2, 50.0, 1e4]
    assert tried[0]["top1"] >= tried[1]["top1"]
    assert tried[0]["loss"] < tried[2]["loss"]
    assert choose(features, 4, replace(config, weight_decays=(50.0,))) == ((0.1, 50.0), [])
    sgd = replace(config, solver="sgd", lrs=(1e-6, 0.1), weight_decays=(1e-3,), epochs=20)
    assert choose(features, 4, sgd)[0] == (0.1, 1e-3)


def test_what_is_held_out_is_not_trained_on() -> None:
    rng = np.random.default_rng(4)
    noise = Features(  # more dimensions than records: what is trained on is learnt by heart
        feature=rng.normal(size=(80, 1, 200)).astype(np.float32),
        label=np.arange(80) % 4,
        uid=rng.integers(0, 1 << 62, 80).astype(np.uint64),
    )
    config = Config(compute=CPU, weight_decays=(1e-4, 1e-3))
    probe = fit(noise, 4, config, 0.1, 1e-3)
    assert topk_accuracy(probe.scores(noise, "features"), noise.label, 1) == 1.0
    assert max(row["top1"] for row in choose(noise, 4, config)[1]) < 0.7


def test_too_few_records_to_hold_any_out() -> None:
    with pytest.raises(ValueError, match=r"8 training records are too few to hold out a share of 0\.2"):
        choose(blobs(8, 1), 4, Config(compute=CPU))


def test_a_packed_corpus(bright: ShardIndex, colour: Any, compute: Compute, tmp_path: Path) -> None:
    config = Config(weight_decays=(1e-4,), views=Views(clips=2), compute=compute)
    report = evaluate(colour, bright.root, tmp_path, config)
    assert report.metrics == {"top1": 1.0, "mean_class_accuracy": 1.0, "train_top1": 1.0}
    assert [row["class"] for row in report.rows] == ["dark", "grey", "light"]
    assert report.artefacts == ["samples.csv", "confusion.png"]
    assert all((tmp_path / name).stat().st_size > 100 for name in report.artefacts)
    assert report.settings["chosen"] == {"lr": 0.1, "weight_decay": 1e-4}
    for average in ("prob", "score"):
        report = evaluate(colour, bright.root, tmp_path, replace(config, average=average))
        assert report.metrics["top1"] == 1.0


def test_the_test_split_chooses_nothing(
    bright: ShardIndex, relabel: Callable[..., ShardIndex], colour: Any, compute: Compute, tmp_path: Path
) -> None:
    config = Config(held_out=0.3, views=Views(clips=1), compute=compute)
    report = evaluate(colour, bright.root, tmp_path / "a", config)
    labels = np.where(bright.column("split") == "test", (bright.column("label") + 1) % 3, bright.column("label"))
    other = relabel(bright, tmp_path / "data", labels, bright.column("split"), bright.classes)
    shuffled = evaluate(colour, other.root, tmp_path / "b", config)
    for key in ("chosen", "tried"):
        assert shuffled.settings[key] == report.settings[key]
    assert len(report.settings["tried"]) == 4
    assert shuffled.metrics["train_top1"] == report.metrics["train_top1"]
    assert shuffled.metrics["top1"] == 0.0 < report.metrics["top1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decays": ()}, "need weight_decays >= 0"),
        ({"lrs": (0.0,)}, "lrs > 0"),
        ({"epochs": 0}, "epochs and train_batch must be at least 1, got 0"),
        ({"held_out": 1.0}, r"held_out must lie between 0 and 1, got 1\.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
