"""Golden numbers of the temporal evaluators: action segmentation, detection mAP, AR@AN and feature pooling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipmill.tools.evaluate.localisation_files import read_detections, read_truth
from clipmill.tools.localisation_metrics import Labelled, rescale, score_detection, score_proposals
from clipmill.tools.segmentation_metrics import score_segmentation

FAMILIES = ("segmentation_metrics", "activitynet_detection", "feature_pooling")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "temporal"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def test_segmentation(golden: Path) -> None:
    for data in family(golden, "segmentation_metrics"):
        videos = range(len(data["lengths"]))
        found, truth = [data[f"pred_{i}"] for i in videos], [data[f"gt_{i}"] for i in videos]
        assert [len(labels) for labels in truth] == data["lengths"].tolist()
        score = score_segmentation(found, truth, background=data["background_ids"].astype(int).tolist())
        np.testing.assert_allclose(score.edits, data["edit_per_video"], rtol=1e-12)
        np.testing.assert_array_equal(score.counts, data["tp_fp_fn_per_video_overlap"])
        np.testing.assert_allclose([score.mof, score.edit], [data["mof"], data["edit"]], rtol=1e-12)
        np.testing.assert_allclose(score.f1, data["f1_10_25_50"], rtol=1e-12)


def test_detection(golden: Path) -> None:
    for data in family(golden, "activitynet_detection"):
        truth, found = data["gt_video_start_end_label"], data["pred_video_start_end_label_score"]
        score = score_detection(
            Labelled(video=found[:, 0], label=found[:, 3], segment=found[:, 1:3], score=found[:, 4]),
            Labelled(video=truth[:, 0], label=truth[:, 3], segment=truth[:, 1:3]),
            data["tiou"].tolist(),
        )
        assert list(score.classes) == data["classes"].tolist()
        np.testing.assert_allclose(score.ap, data["ap_thr_class"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(score.by_threshold, data["map_per_thr"], rtol=1e-12)
        np.testing.assert_allclose(score.average, data["average_map"], rtol=1e-12)


def test_proposals(golden: Path) -> None:
    for data in family(golden, "activitynet_detection"):
        rows, truth = data["proposals_video_start_end_score"], data["gt_video_start_end_label"]
        found = {video: rows[rows[:, 0] == video, 1:4] for video in np.unique(rows[:, 0]).tolist()}
        actual = {video: truth[truth[:, 0] == video, 1:3] for video in np.unique(truth[:, 0]).tolist()}
        thresholds = data["tiou"].tolist()
        score = score_proposals(found, actual, per_video=None, thresholds=thresholds)
        np.testing.assert_allclose(score.recall, data["official_recall"], rtol=1e-12)
        np.testing.assert_allclose(score.average_recall, data["official_ar"], rtol=1e-12)
        np.testing.assert_allclose(score.numbers, data["official_proposals_per_video"], rtol=1e-12)
        bounded = {name.removeprefix("mm").removesuffix("_ar") for name in data if name.startswith("mm")}
        for number in {name for name in bounded if name.isdigit() or name == ""}:
            score = score_proposals(found, actual, per_video=float(number) if number else None, thresholds=thresholds)
            np.testing.assert_allclose(score.average_recall, data[f"mm{number}_ar"], rtol=1e-12)
            np.testing.assert_allclose(score.numbers, data[f"mm{number}_ppv"], rtol=1e-12)
            np.testing.assert_allclose(score.auc, data[f"mm{number}_auc"], rtol=1e-12)


def test_feature_pooling(golden: Path) -> None:
    for data in family(golden, "feature_pooling"):
        pooled = [name for name in data if name.startswith("pooled")]
        assert pooled
        for name in pooled:
            size, how, number = name.removeprefix("pooled").split("_")
            bins = 5 if how == "max" else 3  # as the README says
            found = rescale(data[f"raw_{number}"], int(size), bins, how)
            np.testing.assert_allclose(found, data[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_official_sample(test_data: Path) -> None:
    folder = test_data / "data" / "activitynet_sample"
    truth = read_truth(folder / "gt.json")
    names = json.loads((folder / "gt.json").read_text())
    assert {f"v_{video}" for video in truth} == set(names)
    found = read_detections(folder / "result.json")
    score = score_detection(found, Labelled.of({video: (one.labels, one.segments) for video, one in truth.items()}))
    expected = [0.714286] * 3 + [0.6875] * 2 + [0.597222] + [0.520833] * 3 + [0.5]
    np.testing.assert_allclose(score.by_threshold, expected, atol=1e-6)
    assert score.average == pytest.approx(0.617758, abs=1e-6)
