"""Golden numbers of propagation that lie with the methods: VFS's attention, loop and poses, ContrastCorr's loop, parts.

The other families of these folders are claimed by the tests of the methods themselves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.tools import propagate
from clipmill.tools.evaluate import vip
from clipmill.tools.evaluate.presets import DAVIS
from clipmill.tools.evaluate.propagation import first_labels, read_out
from clipmill.tools.pose import THRESHOLDS, errors, pck, read_joints

STRIDE = 8  # of ContrastCorr's features


def family(test_data: Path, folder: str, name: str) -> list[tuple[str, dict[str, np.ndarray]]]:
    files = sorted((test_data / "golden" / folder).glob(f"{name}_*.npz"))
    assert files, f"no {name}_*.npz in golden/{folder}"
    return [(path.name, dict(np.load(path))) for path in files]


@pytest.fixture(params=["float64", "compiled", "tiles"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Exact numbers, the compiled CPU kernel in float32, and float32 in tiles."""
    if request.param == "tiles":
        monkeypatch.setattr(propagate, "_compiled", lambda *_: False)
    return torch.float64 if request.param == "float64" else torch.float32


def close(found: torch.Tensor, expected: np.ndarray, name: str) -> None:
    exact = found.dtype == torch.float64
    rtol, atol = (1e-9, 1e-12) if exact else (1e-4, 1e-5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=atol, err_msg=name)


def test_attention_of_vfs(test_data: Path, dtype: torch.dtype) -> None:
    for name, data in family(test_data, "vfs", "propagation_attention"):
        rule = replace(
            DAVIS["vfs"].rule,
            radius=int(data["hp.neighbor_range"]) // 2,
            tau=float(data["hp.temperature"]),
            topk=int(data["hp.topk"]),
        )
        query, key, value = (torch.from_numpy(data[part][0]).to(dtype) for part in ("query", "key", "value"))
        height, width = query.shape[1:]
        half = np.array(propagate.half_widths(rule, height, width))
        y, x = np.divmod(np.arange(height * width), width)
        allowed = abs(x[:, None] - x) <= half[y[:, None] - y + height - 1]
        np.testing.assert_array_equal(allowed, data["mask"], err_msg=name)
        query, key = (torch.nn.functional.normalize(part, dim=0) for part in (query, key))
        found = propagate.attend(
            query.movedim(0, -1).contiguous(),
            key.permute(1, 2, 3, 0).contiguous(),
            value.permute(1, 2, 3, 0).contiguous(),
            range(key.shape[1]),
            rule,
            free=int(data["hp.non_mask_len"]),
        )
        close(found.movedim(-1, 0)[None], data["output"], name)


def test_loop_of_vfs(test_data: Path, dtype: torch.dtype) -> None:
    for name, data in family(test_data, "vfs", "propagation_video"):
        protocol = DAVIS["vfs"]
        rule = replace(
            protocol.rule,
            context=int(data["hp.precede_frames"]),
            radius=int(data["hp.neighbor_range"]) // 2,
            tau=float(data["hp.temperature"]),
            topk=int(data["hp.topk"]),
        )
        features = torch.from_numpy(data["features"]).to(dtype)
        label = data["seg_first"].astype(np.uint8)
        first, ids = first_labels(label, features.shape[2:], protocol)
        soft = torch.stack(list(propagate.propagate(features, first, rule)))
        close(soft, data["logits"], name)
        found = [read_out(one, ids, label.shape, label.shape, protocol.rescale) for one in soft]
        np.testing.assert_array_equal(np.stack([label, *found]), data["labels"], err_msg=name)


def test_poses_of_vfs(test_data: Path) -> None:
    for name, data in family(test_data, "vfs", "jhmdb_pose"):
        counted = []
        for maps, truth, expected in zip(data["heatmaps"], data["gt_pos_img"], data["coords"], strict=True):
            found = np.stack([read_joints(torch.from_numpy(one), 5) for one in maps], -1)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9, err_msg=name)
            counted.append(errors(found, truth - 1, first_frame=True, strict=True))
        np.testing.assert_allclose(100 * pck(counted, THRESHOLDS).mean(1), data["pck"], rtol=1e-9, err_msg=name)


def test_loop_of_contrastcorr(test_data: Path, dtype: torch.dtype) -> None:
    for name, data in family(test_data, "contrastcorr", "propagation"):
        protocol = DAVIS["contrastcorr"]
        rule = replace(
            protocol.rule, context=int(data["hp.pre_num"]), tau=float(data["hp.temp"]), topk=int(data["hp.topk"])
        )
        features = torch.from_numpy(data["features"]).to(dtype)
        affinity = features[0].flatten(1).T @ features[1].flatten(1)  # reference, target
        mutual = propagate.mutual_matching(affinity, affinity.amax(0, keepdim=True), affinity.amax(1, keepdim=True))
        close(mutual[None], data["aff_mutual_0_1"], name)
        first = torch.from_numpy(data["seg_first"]).to(dtype)
        soft = torch.stack(list(propagate.propagate(features, first, rule)))
        close(soft, data["soft"], name)
        size = (features.shape[2] * STRIDE, features.shape[3] * STRIDE)
        ids = np.arange(len(first), dtype=np.uint8)
        found = [read_out(one, ids, size, data["labels"].shape[1:], protocol.rescale) for one in soft]
        np.testing.assert_array_equal(np.stack(found), data["labels"], err_msg=name)


def test_parts_of_contrastcorr(test_data: Path) -> None:
    names = {"mIoU": "mean_iou", "accuracy": "overall_acc", "mean_accuracy": "mean_acc", "fw_IoU": "fw_iou"}
    for name, data in family(test_data, "contrastcorr", "vip_metrics"):
        pairs = zip(data["gt"], data["pred"], strict=True)
        matrix = np.sum([vip.confusion(truth, found) for truth, found in pairs], 0)
        np.testing.assert_array_equal(matrix, data["hist"], err_msg=name)
        for ours, theirs in names.items():
            assert vip.part_scores(matrix)[ours] == pytest.approx(float(data[theirs]), abs=1e-12), (name, theirs)
