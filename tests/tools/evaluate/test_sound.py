"""Sound classification through packed shards: folds, windows, both classifiers, and what must not change a score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clipmill.models.encoder import build_encoder, save_encoder
from clipmill.pipeline.audio import log_mel
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardReader
from clipmill.pipeline.sound_spec import AudioSpec, LogMel
from clipmill.pipeline.views import View
from clipmill.tools.cli import main
from clipmill.tools.evaluate.baselines import LogMelBands
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.opening import open_encoder
from clipmill.tools.evaluate.sound import (
    Config,
    describe,
    evaluate,
    folds_of,
    probe_features,
    random_windows,
    strong,
    svm_features,
    window_starts,
)

QUICK = {"test_windows": 3, "train_windows": 2, "window_s": 0.5, "costs": (0.1, 1.0)}


@pytest.fixture(scope="session")
def tones(make_dataset: Callable, relabel: Callable, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """24 recordings of one tone each, low, middle and high, in four folds."""
    base = tmp_path_factory.mktemp("tones")
    plain = make_dataset(base / "plain", num_records=24, num_frames=20, size=(16, 16))
    label = np.arange(24) // 8
    return relabel(plain, base / "folds", label, [f"fold{i % 4 + 1}" for i in range(24)], ["low", "middle", "high"])


def settings(compute: Compute, **options) -> Config:
    return Config(**{**QUICK, "compute": compute, **options})


@pytest.mark.parametrize("classifier", ["svm", "linear"])
@pytest.mark.parametrize("features", ["maps", "pooled"])
def test_tones_are_told_apart_in_four_folds(
    tones: ShardIndex, tmp_path: Path, compute: Compute, classifier: str, features: str
) -> None:
    config = settings(compute, classifier=classifier, features=features, epochs=60, lr=0.05, augment=False)
    report = evaluate(LogMelBands(), Path(tones.root), tmp_path, config)
    assert [row["fold"] for row in report.rows] == ["fold1", "fold2", "fold3", "fold4"]
    assert all((row["train"], row["test"]) == (18, 6) for row in report.rows)
    assert report.metrics["top1"] == pytest.approx(np.mean([row["top1"] for row in report.rows]))
    assert report.metrics["top1"] > 0.8
    report.save(tmp_path)
    assert json.loads((tmp_path / "score.json").read_text())["metrics"]["top1"] == report.metrics["top1"]
    lines = (tmp_path / "samples.csv").read_text().splitlines()
    assert len(lines) == 25  # every recording is scored exactly once


def test_a_fixed_split_is_one_fold(tones: ShardIndex, relabel: Callable, tmp_path: Path, compute: Compute) -> None:
    split = ["test" if i % 4 == 0 else "train" for i in range(24)]
    index = relabel(tones, tmp_path / "split", tones.column("label"), split, tones.classes)
    report = evaluate(LogMelBands(), Path(index.root), tmp_path, settings(compute, train_windows=0))
    assert [(row["fold"], row["train"], row["test"]) for row in report.rows] == [("test", 18, 6)]
    assert report.metrics["top1"] == 1.0


def test_the_same_options_give_the_same_score(tones: ShardIndex, tmp_path: Path, compute: Compute) -> None:
    encoder = build_encoder("audio_resnet18", width=0.125)
    texts = [evaluate(encoder, Path(tones.root), tmp_path, settings(compute)).to_json() for _ in range(2)]
    assert texts[0] == texts[1]
    best = evaluate(encoder, Path(tones.root), tmp_path, settings(compute, best_cost_on_test=True))
    assert best.metrics["top1"] >= json.loads(texts[0])["metrics"]["top1"]


def test_features_of_every_window(tones: ShardIndex, compute: Compute) -> None:
    """Windows of one column to the next are cut from the spectrogram of the whole recording."""
    encoder = LogMelBands()
    view = encoder.audio_view
    assert view is not None
    view = replace(view, duration_s=0.2)
    few = tones.select(np.arange(2))
    config = settings(compute, test_windows=4, train_windows=0, features="pooled")
    seen, unseen = describe(encoder, few, view, config)
    assert seen.shape == unseen.shape == (2, 4, 160)
    assert np.array_equal(seen, unseen)
    trimmed, _ = describe(encoder, few, view, replace(config, trim=True))
    assert np.array_equal(trimmed[:, 0], trimmed[:, 2])  # one column of room: all but the last begin at 0
    assert not np.array_equal(unseen[:, 0], unseen[:, 2])
    pcm = ShardReader().samples(few[1], 0, few[1].num_samples)
    assert isinstance(view.augment, AudioSpec)
    assert view.augment.logmel is not None
    whole = log_mel(torch.from_numpy(pcm)[None].float() / 32768, view.augment.logmel)
    start = int(window_starts(whole.shape[2], 20, 4)[2])
    np.testing.assert_allclose(unseen[1, 2, :80], whole[0, :, start : start + 20].mean(1), atol=1e-4)


def test_random_windows_are_drawn_per_record_and_augmented(tones: ShardIndex, compute: Compute) -> None:
    view = View(name="w", modality="audio", duration_s=0.5, augment=AudioSpec(logmel=LogMel(mels=40)))
    record = tones[3]
    pcm = ShardReader().samples(record, 0, record.num_samples)
    config = settings(compute, train_windows=3)
    one, two = (random_windows(pcm, record, view, config) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (3, 1, 40, 51)
    plain = random_windows(pcm, record, view, replace(config, augment=False))
    assert not torch.allclose(plain, one)
    other = random_windows(pcm, replace(record, uid=99), view, config)
    assert not torch.allclose(other, one)
    names = [type(op).__name__ for op in strong(view).augment.ops]
    assert names == ["Volume", "TimeWarp", "Mask", "Mask", "MelCrop"]


@hypothesis_settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 600), st.integers(1, 60))
def test_windows_cover_the_recording(total: int, length: int, count: int) -> None:
    starts = window_starts(total, length, count)
    if length > total:
        assert (starts == -1).all()
        return
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    if count > 1:
        assert starts[-1] == max(total - length, 1)


def test_poolings() -> None:
    maps = torch.rand(2, 5, 3, 7)
    found = svm_features(maps)
    assert found.shape == (2, 5 * 3 * 3)
    lines = found.view(2, 5, 3, 3).norm(dim=3) * (1 + 1e-5) ** 0.5
    assert torch.allclose(lines, torch.ones_like(lines))
    assert torch.allclose(probe_features(maps).norm(dim=1), torch.ones(2))
    assert svm_features(torch.rand(1, 4, 3, 1)).shape == (1, 12)  # a single column is pooled alone


def test_the_view_of_the_run_is_used(tones: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = build_encoder("audio_resnet18", width=0.125)
    encoder.audio_view = View(
        name="sound", modality="audio", duration_s=0.4, augment=AudioSpec(logmel=LogMel(mels=32, hop=320))
    )
    save_encoder(encoder, tmp_path / "run")
    options = ["--test-windows", "2", "--train-windows", "0", "--costs", "1", "--device", "cpu", "--json"]
    assert main(["evaluate", "sound", str(tmp_path / "run"), str(tones.root), *options]) == 0
    score = json.loads(capsys.readouterr().out)
    assert "mels=32" in score["settings"]["view"]
    assert "duration_s=0.4" in score["settings"]["view"]
    assert (tmp_path / "run" / "evaluate" / "sound" / "score.json").is_file()


def test_clear_errors(tones: ShardIndex, relabel: Callable, tmp_path: Path, compute: Compute) -> None:
    with pytest.raises(ValueError, match="this encoder is for pictures"):
        evaluate(open_encoder("random:resnet18:width=0.125"), Path(tones.root), tmp_path, settings(compute))
    labels = tones.column("label")
    with pytest.raises(ValueError, match="every record needs a fold"):
        folds_of(relabel(tones, tmp_path / "one", labels, ["a"] * 24))
    alone = ["b" if label == 2 else "a" for label in labels.tolist()]
    with pytest.raises(ValueError, match="in no other fold"):
        folds_of(relabel(tones, tmp_path / "alone", labels, alone))
    with pytest.raises(ValueError, match="costs must be greater than 0"):
        Config(costs=())
    shutil.rmtree(tmp_path / "one")
