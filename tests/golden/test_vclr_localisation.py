"""Golden numbers of VCLR's localisation protocol: features of equal length, the BMN network, AR@AN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.tools.bmn import BMN, bmn_loss, labels_of, proposals, sample_mask, soft_nms, valid_cells
from clipmill.tools.evaluate.localisation_files import corrected_s, snippets
from clipmill.tools.localisation_metrics import rescale, score_proposals

FAMILIES = ("bmn", "anet_features", "ar_an")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "vclr"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def test_features(golden: Path) -> None:
    for data in family(golden, "anet_features"):
        points, bins = int(data["num_points"]), int(data["bins"])
        for number, length in enumerate(data["lengths"].tolist()):
            x = data[f"in_{number}"]
            assert len(x) == length
            found = rescale(x, points, bins)
            # the reference interpolates in float32
            np.testing.assert_allclose(found, data[f"out_{number}"], rtol=1e-6, atol=1e-6)
        interval = int(data["untrimmed_interval"])
        for total, row in zip(data["untrimmed_total"].tolist(), data["untrimmed_idx"], strict=True):
            assert snippets(total, interval).tolist() == row[row >= 0].tolist()


def test_average_recall(golden: Path) -> None:
    for data in family(golden, "ar_an"):
        videos = range(int(data["num_videos"]))
        score = score_proposals(
            {i: data[f"prop_{i}"] for i in videos},
            {i: data[f"gt_{i}"] for i in videos},
            per_video=float(data["max_avg_proposals"]),
            thresholds=data["tiou"].tolist(),
        )
        np.testing.assert_allclose(score.recall, data["recall"], rtol=1e-9)
        np.testing.assert_allclose(score.average_recall, data["avg_recall"], rtol=1e-9)
        np.testing.assert_allclose(score.numbers, data["proposals_per_video"], rtol=1e-9)
        np.testing.assert_allclose(score.auc, data["auc"], rtol=1e-9)
        np.testing.assert_allclose([score.at(n) for n in data["ar_at"].tolist()], data["ar"], rtol=1e-9)


def network(data: dict[str, np.ndarray]) -> BMN:
    params = {name.removeprefix("param."): torch.tensor(x) for name, x in data.items() if name.startswith("param.")}
    base, deep, plane = (len(params[f"{name}.0.bias"]) for name in ("x_1d_p", "x_3d_p", "x_2d_p"))
    dim = data["feature"].shape[1]
    model = BMN(
        dim,
        steps=int(data["tscale"]),
        samples=int(data["num_samples"]),
        bins=int(data["num_samples_per_bin"]),
        extend=float(data["boundary_ratio"]),
        widths=(base, deep, plane),
        groups=dim // params["x_1d_b.0.weight"].shape[1],
    )
    model.load_state_dict(params)
    return model.double().eval()


def test_masks(golden: Path) -> None:
    for data in family(golden, "bmn"):
        steps, samples, bins = (int(data[name]) for name in ("tscale", "num_samples", "num_samples_per_bin"))
        found = sample_mask(steps, samples, bins, float(data["boundary_ratio"]))
        np.testing.assert_allclose(found.reshape(steps, -1), data["sample_mask"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(valid_cells(steps), data["bm_mask"])


def test_labels_network_and_loss(golden: Path) -> None:
    for data in family(golden, "bmn"):
        steps, videos = int(data["tscale"]), range(len(data["feature"]))
        labels = [np.stack(parts) for parts in zip(*(labels_of(data[f"gt_{i}"], steps) for i in videos), strict=True)]
        for found, name in zip(labels, ("conf", "start", "end"), strict=True):
            np.testing.assert_allclose(found, data[f"label_{name}"], rtol=1e-6, atol=1e-7, err_msg=name)
        with torch.no_grad():
            answer = network(data)(torch.tensor(data["feature"]).double())
        for found, name in zip(answer, ("conf", "start", "end"), strict=True):
            np.testing.assert_allclose(found, data[f"pred_{name}"], rtol=1e-6, atol=1e-6, err_msg=name)
        target = tuple(torch.tensor(data[f"label_{name}"]) for name in ("conf", "start", "end"))
        draws = torch.tensor(data["rand_mid"]), torch.tensor(data["rand_low"])
        terms = bmn_loss(answer, target, draws)
        for name in ("loss", "loss_tem", "loss_reg", "loss_cls"):
            found = terms[name.removeprefix("loss_")]
            np.testing.assert_allclose(found, data[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_proposals(golden: Path) -> None:
    for data in family(golden, "bmn"):
        seconds = corrected_s(
            int(data["duration_frame"]), float(data["duration_second"]), int(data["feature_interval"])
        )
        for number in range(len(data["feature"])):
            answer = (data[f"pred_{name}"][number] for name in ("conf", "start", "end"))
            found = soft_nms(
                proposals(*answer),
                alpha=float(data["soft_nms_alpha"]),
                low=float(data["soft_nms_low"]),
                high=float(data["soft_nms_high"]),
                top=int(data["top_k"]),
            )
            found[:, :2] *= seconds
            np.testing.assert_allclose(found, data[f"proposals_{number}"], rtol=1e-6, atol=1e-7)
