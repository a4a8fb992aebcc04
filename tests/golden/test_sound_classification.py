"""Golden numbers of sound classification: front end, windows, features of both heads, support vector machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipmill.pipeline.audio import log_mel
from clipmill.pipeline.sound_spec import LogMel
from clipmill.tools.evaluate.sound import probe_features, svm_features, window_starts
from clipmill.tools.linear_svm import fit_svm
from clipmill.tools.metrics import topk_accuracy

FAMILIES = ("logmel", "clips_and_heads", "svm_protocol")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "sound_classification"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def numbers(data: dict[str, np.ndarray], stem: str) -> list[str]:
    found = [name.removeprefix(stem) for name in data if name.startswith(stem)]
    assert found
    return found


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def test_log_mel(golden: Path) -> None:
    for data in family(golden, "logmel"):
        for number in numbers(data, "wave_int16_"):
            hz, duration_s, mels, n_fft, hop, trim = data[f"args_{number}_fps_dur_nmels_nfft_hop_trim"].tolist()
            wave = torch.from_numpy(data[f"wave_int16_{number}"].astype(np.float32) / 32768).mean(0, keepdim=True)
            if trim:
                length = int(duration_s * hz)
                wave = F.pad(wave, (0, max(length - wave.shape[1], 0)))[:, :length]
            mel = LogMel(
                hz=int(hz),
                n_fft=int(n_fft),
                win=int(n_fft),
                hop=int(hop),
                mels=int(mels),
                pad="constant",
                power_floor=2.2e-16,
                mean=-5.3688107,
                std=4.410007,
            )
            found = log_mel(wave, mel)
            np.testing.assert_allclose(found.numpy(), data[f"logmel_{number}"], rtol=0, atol=1e-3)


def test_window_starts(golden: Path) -> None:
    for data in family(golden, "clips_and_heads"):
        for number, (total, chunk, count) in enumerate(data["chunk_args_T_chunk_nclips"].tolist()):
            assert window_starts(total, chunk, count).tolist() == data[f"chunk_start_{number}"].tolist()


def test_features_of_both_heads(golden: Path) -> None:
    for data in family(golden, "clips_and_heads"):
        for number in numbers(data, "conv5x_"):
            maps = torch.from_numpy(data[f"conv5x_{number}"])
            found = svm_features(maps).numpy()
            np.testing.assert_allclose(found, data[f"svm_feature_{number}"], rtol=0, atol=1e-5)
            if f"fc_logits_{number}" in data:
                weight, bias = (torch.from_numpy(data[f"fc_{part}_{number}"]) for part in ("weight", "bias"))
                logits = probe_features(maps) @ weight.T + bias
                np.testing.assert_allclose(logits.numpy(), data[f"fc_logits_{number}"], rtol=0, atol=1e-5)


def test_support_vector_machine(golden: Path) -> None:
    for data in family(golden, "svm_protocol"):
        stem = "clip_decision_"
        given = {float(name): data[f"{stem}{name}"] for name in numbers(data, stem)}
        test, labels = data["test_feat_n_clips_d"], data["test_label"]
        tolerance = 100 / len(labels) + 1e-9  # one video
        for cost, top1, top5 in zip(data["costs"].tolist(), data["video_top1"], data["video_top5"], strict=True):
            machine = fit_svm(data["train_feat"].astype(np.float64), data["train_label"], cost, max_iter=20000)
            found = machine.decisions(test.astype(np.float64))
            expected = next(value for key, value in given.items() if np.isclose(key, cost, rtol=1e-6))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)
            video = found.mean(1)
            assert abs(100 * topk_accuracy(video, labels, 1) - top1) <= tolerance
            assert abs(100 * topk_accuracy(video, labels, 5) - top5) <= tolerance
