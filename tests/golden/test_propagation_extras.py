"""Golden numbers of JHMDB poses (CRW's scripts and VFS) and of VIP parts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.tools.evaluate import vip
from clipmill.tools.pose import box_sizes, errors, heat_map, pck, read_joints

FAMILIES = ("pck_vfs", "pck", "pose_heatmaps", "vip_miou")  # a file belongs to the first that its name begins with


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "propagation_extras"


def family_of(path: Path) -> str:
    return next((name for name in FAMILIES if path.name.startswith(name)), "")


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    files = [path for path in sorted(golden.glob("*.npz")) if family_of(path) == name]
    assert files, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in files]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not family_of(path)] == []


def thresholds(key: str, count: int) -> np.ndarray:
    low, high = (float(number) for number in re.findall(r"\d+\.\d+", key))
    return np.linspace(low, high, count)


def test_pck_of_crw(golden: Path) -> None:
    for data in family(golden, "pck"):
        (key,) = [key for key in data if key.startswith("crw_pck_per_joint")]
        found = []
        for video in range(int(data["n_videos"])):
            (name,) = [name for name in data if re.fullmatch(rf"pred_grid\d+_{video}", name)]
            cells = int(re.findall(r"\d+", name)[0])
            seen = data[name][0] >= 0
            position = data[name] * data[f"size_wh_{video}"][:, None, None] / cells
            truth = data[f"gt_pos_img_{video}"] - 1
            np.testing.assert_allclose(box_sizes(truth, seen), data[f"crw_box_norm_{video}"], rtol=1e-12)
            position = np.where(seen, position, -1.0)
            found.append(errors(position, truth, first_frame=False, strict=False))
        shares = 100 * pck(found, thresholds(key, len(data[key])).round(9))
        np.testing.assert_allclose(np.concatenate([shares, shares.mean(1, keepdims=True)], 1), data[key], atol=1e-9)


def test_pck_of_vfs(golden: Path) -> None:
    for data in family(golden, "pck_vfs"):
        (key,) = [key for key in data if key.startswith("vfs_pck")]
        videos = sorted(name.removeprefix("pred_xy_") for name in data if name.startswith("pred_xy_"))
        found = [
            errors(data[f"pred_xy_{v}"], data[f"gt_pos_img_{v}"] - 1, first_frame=True, strict=True) for v in videos
        ]
        shares = 100 * pck(found, thresholds(key, len(data[key])).round(9)).mean(1)
        np.testing.assert_allclose(shares, data[key], atol=1e-9)


def test_heat_maps(golden: Path) -> None:
    for data in family(golden, "pose_heatmaps"):
        keys = [key for key in data if "_heat_sigma" in key]
        assert keys
        for key in keys:
            sigma = float(key.rpartition("sigma")[2])
            for (x, y), expected in zip(data["points_xy"], data[key], strict=True):
                found = heat_map(x, y, sigma, *expected.shape)
                np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0, err_msg=f"{key} {x} {y}")


def test_reading_joints(golden: Path) -> None:
    for data in family(golden, "pose_heatmaps"):
        for key in (key for key in data if "_coords_top" in key):
            topk = int(key.rpartition("top")[2])
            if key.startswith("crw"):
                found = read_joints(torch.from_numpy(data["pose_pred_hwc"]).movedim(-1, 0)[1:], topk)
            else:
                maps = torch.from_numpy(data["vfs_heat_tkhw"])
                found = np.stack([read_joints(one, topk) for one in maps], -1)
            np.testing.assert_allclose(found, data[key], atol=2e-6, rtol=1e-6, err_msg=key)


def test_parts(golden: Path) -> None:
    for data in family(golden, "vip_miou"):
        pairs = zip(data["gt"], data["pred"], strict=True)
        matrix = np.sum([vip.confusion(truth, found) for truth, found in pairs], 0)
        np.testing.assert_array_equal(matrix, data["hist"])
        scores = vip.part_scores(matrix)
        for ours, theirs in (
            ("mIoU", "mean_iou"),
            ("mIoU", "mm_mean_iou"),
            ("accuracy", "overall_acc"),
            ("accuracy", "mm_all_acc"),
            ("fw_IoU", "fwavacc"),
        ):
            assert scores[ours] == pytest.approx(float(data[theirs]), abs=1e-12), theirs
        assert scores["mean_accuracy"] == pytest.approx(float(np.nanmean(data["class_acc"])), abs=1e-12)
        rows = {row["part"]: row for row in vip.part_rows(matrix)}
        for number, name in enumerate(vip.CLASSES):
            for column, keys in (("IoU", ("class_iou", "mm_class_iou")), ("accuracy", ("class_acc", "mm_class_acc"))):
                for key in keys:
                    value = rows.get(name, {}).get(column)
                    np.testing.assert_allclose(np.nan if value is None else value, data[key][number], atol=1e-12)
