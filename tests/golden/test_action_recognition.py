"""Golden numbers of test-time views, accuracy and retrieval (mmaction2, VCLR, CoCLR)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipmill.tools import metrics
from clipmill.tools.evaluate import crops, views

FAMILIES = ("views_accuracy", "retrieval")
BOXES = {"three_crop": crops.three_crop, "ten_crop": crops.ten_crop, "center_crop": crops.center_crop}


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "action_recognition"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    files = sorted(golden.glob(f"{name}*.npz"))
    assert files, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in files]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    names = {path.name for path in golden.glob("*.npz")}
    assert names == {path.name for name in FAMILIES for path in golden.glob(f"{name}*.npz")}


def test_sampled_frames(golden: Path) -> None:
    for data in family(golden, "views_accuracy"):
        rows = data["sample_args_total_cliplen_interval_numclips_twice_repeatlast"].tolist()
        assert len(rows) == sum(key.startswith("sample_") for key in data) - 1
        for number, (total, length, interval, clips, twice, repeat_last) in enumerate(rows):
            short = "repeat" if repeat_last else "loop"
            frames = views.sample_frames(total, length, interval, clips, twice=bool(twice), short=short)
            np.testing.assert_array_equal(frames, data[f"sample_{number}"], err_msg=f"row {rows[number]}")


def test_crop_boxes(golden: Path) -> None:
    for data in family(golden, "views_accuracy"):
        checked = 0
        for name, boxes in BOXES.items():
            for key in (key for key in data if key.startswith(f"{name}_")):
                height, width, size = data[f"crop_args_{key.rsplit('_', 1)[1]}_h_w_size"].tolist()
                found = np.array(boxes(height, width, size))
                np.testing.assert_array_equal(found.reshape(data[key].shape), data[key], err_msg=key)
                checked += 1
        assert checked == sum(key.startswith(tuple(BOXES)) for key in data) > 0


def test_accuracy_of_averaged_views(golden: Path) -> None:
    for data in family(golden, "views_accuracy"):
        labels = data["labels"]
        for how in ("score", "prob"):
            average = metrics.average_views(data["logits_n_views_classes"], how)
            np.testing.assert_allclose(average, data[f"avg_{how}"], rtol=1e-5, atol=1e-6)
            accuracy = [metrics.topk_accuracy(average, labels, k) for k in (1, 5)]
            np.testing.assert_allclose(accuracy, data[f"top1_top5_{how}"], atol=1e-9)
            mean = metrics.mean_class_accuracy(metrics.top_classes(average, 1)[:, 0], labels)
            assert mean == pytest.approx(float(data[f"mean_class_acc_{how}"]), abs=1e-9)


@pytest.mark.parametrize(("source", "centre"), [("vclr", False), ("coclr", True)])
def test_retrieval(golden: Path, source: str, centre: bool) -> None:
    for data in family(golden, "retrieval"):
        expected = data[f"top50_{source}"]
        ks = data["ks"].tolist()
        gallery, query = data["train_feat"], data["test_feat"]
        depth = max(*ks, expected.shape[1])
        numbers, similarity = metrics.retrieve(query, gallery, depth, centre=centre)
        assert (np.diff(similarity, axis=1) <= 0).all()
        rates = metrics.hit_rates(data["train_label"][numbers], data["test_label"], ks)
        np.testing.assert_allclose(rates, data[f"recall_{source}"], atol=1e-6)
        found = numbers[:, : expected.shape[1]]
        if centre:
            query, gallery = query - query.mean(0), gallery - gallery.mean(0)
        exact = metrics.unit_rows(query.astype(float)) @ metrics.unit_rows(gallery.astype(float)).T
        rows, columns = np.nonzero(found != expected)  # only rounding of (nearly) equal similarities may swap two
        np.testing.assert_allclose(exact[rows, found[rows, columns]], exact[rows, expected[rows, columns]], atol=1e-6)
        assert len(rows) <= 0.01 * found.size
