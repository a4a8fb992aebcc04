"""Cross-modal retrieval: canonical correlations against their definition, ranks, and the whole benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipmill.models.encoder import build_encoder, save_encoder
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.crossmodal import Config, canonical, evaluate, ranks
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.opening import open_encoder
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import unit_rows


def pairs(count: int, seed: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two spaces that share three of their directions."""
    rng, mixer = np.random.default_rng(seed), np.random.default_rng(99)
    shared = rng.normal(size=(count, 3))
    x = np.concatenate([shared, rng.normal(size=(count, 5))], 1) @ mixer.normal(size=(8, 8))
    y = np.concatenate([shared + noise * rng.normal(size=(count, 3)), rng.normal(size=(count, 3))], 1)
    return x + 4, y @ mixer.normal(size=(6, 6)) - 2


def test_directions_are_uncorrelated_within_and_correlated_across() -> None:
    x, y = pairs(4000, 0)
    pair = canonical(x, y, 6, 1e-9)
    a, b = (x - x.mean(0)) @ pair.axes[0], (y - y.mean(0)) @ pair.axes[1]
    np.testing.assert_allclose(a.T @ a / len(a), np.eye(6), atol=1e-5)
    np.testing.assert_allclose(b.T @ b / len(b), np.eye(6), atol=1e-5)
    np.testing.assert_allclose(a.T @ b / len(a), np.diag(pair.correlation), atol=1e-5)
    np.testing.assert_allclose(pair.correlation[:3], 1 / np.sqrt(1 + 0.3**2), atol=0.03)
    assert pair.correlation[3:].max() < 0.1


def test_partners_are_found_among_unseen_pairs() -> None:
    pair = canonical(*pairs(800, 1), dim=3, ridge=0.01)
    x, y = pairs(100, 2)
    place = ranks(unit_rows(pair.audio(y)) @ unit_rows(pair.video(x)).T)
    assert np.mean(place < 5) > 0.35  # 0.05 by chance
    broken = ranks(unit_rows(pair.audio(y[::-1])) @ unit_rows(pair.video(x)).T)
    assert np.mean(broken < 5) < 0.2


def test_equal_similarities_are_half_a_rank() -> None:
    assert ranks(np.zeros((5, 5))).tolist() == [2.0] * 5


def test_the_benchmark(bright: ShardIndex, compute: Compute, tmp_path: Path) -> None:
    save_encoder(build_encoder("resnet18", width=0.125), tmp_path / "run")
    save_encoder(build_encoder("audio_resnet18", width=0.125), tmp_path / "run" / "audio")
    config = Config(
        audio=str(tmp_path / "run" / "audio"), dim=4, views=Views(clips=1, duration_s=0.2, size=32), compute=compute
    )
    encoder = open_encoder(str(tmp_path / "run"))
    report = evaluate(encoder, Path(bright.root), tmp_path / "out", config)
    assert report.metrics["chance_r@1"] == pytest.approx(1 / 8)
    for name in ("audio_to_video", "video_to_audio"):
        assert 0 <= report.metrics[f"{name}_r@1"] <= report.metrics[f"{name}_r@5"] <= 1
    assert len(report.settings["correlations"]) == 4
    again = evaluate(encoder, Path(bright.root), tmp_path / "out", config)
    assert again.to_json() == report.to_json()


def test_clear_errors(bright: ShardIndex, compute: Compute, tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", width=0.125)
    with pytest.raises(ValueError, match="--audio names"):
        evaluate(encoder, Path(bright.root), tmp_path, Config(compute=compute))
    config = Config(audio="random:resnet18:width=0.125", compute=compute)
    with pytest.raises(ValueError, match="one for pictures"):
        evaluate(encoder, Path(bright.root), tmp_path, config)
    with pytest.raises(ValueError, match="ridge"):
        Config(ridge=0)
