"""Golden numbers of DAVIS: J and F of the official package, propagation of the official VFS, CRW, DINO and UVC code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.datasets.davis import label_map
from clipmill.datasets.synthetic_media import label_map_bytes, voc_palette
from clipmill.tools import davis_metrics, propagate
from clipmill.tools.evaluate import davis_score
from clipmill.tools.evaluate.presets import DAVIS
from clipmill.tools.evaluate.propagation import first_labels, read_out

FAMILIES = (
    "jf_frames",
    "sequence_eval",
    "statistics",
    "palette",
    "prop_vfs",
    "prop_crw",
    "prop_dino",
    "prop_uvc",
    "real_jf",
)
NUMBERS = ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "davis"


def family(golden: Path, name: str) -> list[tuple[str, dict[str, np.ndarray]]]:
    files = sorted(golden.glob(f"{name}*.npz"))
    assert files, f"no {name}*.npz in {golden}"
    return [(path.name, dict(np.load(path))) for path in files]


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    names = {path.name for path in golden.glob("*.npz")}
    assert names == {path.name for name in FAMILIES for path in golden.glob(f"{name}*.npz")}


# --- J and F ------------------------------------------------------------------------------------------------


def test_measures_of_single_frames(golden: Path) -> None:
    for name, data in family(golden, "jf_frames"):
        truth, found, void = data["gt"], data["pred"], data["void"]
        count, frames = data["J"].shape
        assert [davis_metrics.tolerance(truth.shape[1:], th) for th in data["bound_th"]] == data["bound_pix"].tolist()
        for t in range(frames):
            region, edge = davis_metrics.frame_measures(truth[t], found[t], count)
            np.testing.assert_allclose(region, data["J"][:, t], atol=1e-12, rtol=0, err_msg=f"{name} frame {t}")
            for usual in np.flatnonzero(data["bound_th"] == davis_metrics.THRESHOLD):
                expected = data["F"][usual, :, t]
                np.testing.assert_allclose(edge, expected, atol=1e-12, rtol=0, err_msg=f"{name} frame {t}")
            for number in range(count):
                pair = truth[t] == number + 1, found[t] == number + 1
                for row, th in enumerate(data["bound_th"]):
                    score = davis_metrics.boundary_accuracy(*pair, threshold=th)
                    assert score == pytest.approx(data["F"][row, number, t], abs=1e-12)
                masked = (
                    davis_metrics.region_similarity(*pair, void[t]),
                    davis_metrics.boundary_accuracy(*pair, void[t]),
                )
                assert masked == pytest.approx((data["J_void"][number, t], data["F_void"][number, t]), abs=1e-12)
            edges = np.unpackbits(data["boundary_gt_obj1"][t], axis=-1)[:, : truth.shape[2]].astype(bool)
            np.testing.assert_array_equal(davis_metrics.boundary(truth[t] == 1), edges)


def test_whole_sequences(golden: Path) -> None:
    for _, data in family(golden, "sequence_eval"):
        names = [key.removeprefix("gt_") for key in data if key.startswith("gt_")]
        rows = []
        for name in names:
            curves = davis_metrics.sequence_measures(data[f"gt_{name}"], data[f"pred_{name}"])
            for number, pair in enumerate(zip(curves.region, curves.boundary, strict=True), 1):
                values = [value for curve in pair for value in davis_metrics.mean_recall_decay(curve)]
                rows.append({"object": f"{name}_{number}", **dict(zip(davis_score.NUMBERS, values, strict=True))})
        by_name = {row["object"]: row for row in rows}
        assert set(by_name) == set(data["object_names"].tolist())
        for ours, theirs in zip(davis_score.NUMBERS, NUMBERS, strict=True):
            found = [by_name[name][ours] for name in data["object_names"].tolist()]
            np.testing.assert_allclose(found, data[theirs], atol=1e-12, rtol=0)
        whole = list(davis_score.summary(rows).values())
        np.testing.assert_allclose(whole, data["global_JF_Jm_Jr_Jd_Fm_Fr_Fd"], atol=1e-12, rtol=0)


def test_statistics_of_curves(golden: Path) -> None:
    for _, data in family(golden, "statistics"):
        for key in (key for key in data if key.startswith("values_")):
            expected = data[key.replace("values", "mean_recall_decay")]
            found = davis_metrics.mean_recall_decay(data[key])
            np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0, err_msg=key)


def test_colours_of_label_maps(golden: Path) -> None:
    for _, data in family(golden, "palette"):
        np.testing.assert_array_equal(voc_palette(), data["palette"])


def test_real_results(golden: Path, test_data: Path) -> None:
    corpus = test_data / "data" / "davis_eval"
    if not corpus.is_dir():
        pytest.skip(f"no {corpus}")
    checked = 0
    for _, data in family(golden, "real_jf"):
        for key in (key for key in data if key.startswith("J_")):
            method, sequence = re.fullmatch(r"J_([^_]+)_(.+)", key).groups()  # type: ignore[union-attr]
            folders = corpus / "Annotations_2016" / "480p" / sequence, corpus / f"results_{method}" / sequence
            truth, found = ([label_map(path, "2016") for path in sorted(folder.glob("*.png"))] for folder in folders)
            curves = davis_metrics.sequence_measures(truth, found)
            np.testing.assert_allclose(curves.region[0], data[key], atol=1e-12, rtol=0)
            np.testing.assert_allclose(curves.boundary[0], data[f"F{key[1:]}"], atol=1e-12, rtol=0)
            values = [v for c in (curves.region[0], curves.boundary[0]) for v in davis_metrics.mean_recall_decay(c)]
            np.testing.assert_allclose(values, data[f"stats{key[1:]}"], atol=1e-12, rtol=0)
            checked += 1
    assert checked


# --- propagation --------------------------------------------------------------------------------------------


def settings(data: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key.removeprefix("cfg_"): data[key].item() for key in data if key.startswith("cfg_")}


def cases(golden: Path, method: str) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    for name, data in family(golden, f"prop_{method}"):
        yield name, data, settings(data)


def changed(method: str, **changes: Any) -> Any:
    preset = DAVIS[method]
    return replace(preset, rule=replace(preset.rule, **changes))


@pytest.fixture(params=["compiled", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled CPU kernel, and the code in tiles that every other device runs."""
    if request.param == "tiles":
        monkeypatch.setattr(propagate, "_compiled", lambda *_: False)
    return request.param


def soft_labels(data: dict[str, np.ndarray], first: torch.Tensor, rule: propagate.Rule) -> np.ndarray:
    return torch.stack(list(propagate.propagate(torch.from_numpy(data["feats"]), first, rule))).numpy()


def check(name: str, soft: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(soft, expected, atol=2e-6, rtol=0, err_msg=name)


def hard(first: torch.Tensor, soft: np.ndarray, ids: np.ndarray, size: tuple, native: tuple, protocol: Any) -> list:
    frames = [first, *torch.from_numpy(soft)]
    return [read_out(one.double() if protocol.exact else one, ids, size, native, protocol.rescale) for one in frames]


def test_vfs(golden: Path, way: str) -> None:
    for name, data, cfg in cases(golden, "vfs"):
        protocol = changed(
            "vfs",
            context=cfg["ctx"],
            topk=cfg["topk"],
            tau=cfg["temp"],
            radius=cfg["range"] // 2,
            free_first=not cfg["first_nb"],
        )
        label = data["first_label"]
        first, ids = first_labels(label, (cfg["h"], cfg["w"]), protocol)
        soft = soft_labels(data, first, protocol.rule)
        check(name, soft, data["soft"])
        found = hard(first, soft, ids, label.shape, label.shape, protocol)
        np.testing.assert_array_equal(np.stack([label, *found[1:]]), data["pred"], err_msg=name)


def test_crw(golden: Path, way: str) -> None:
    for name, data, cfg in cases(golden, "crw"):
        protocol = changed("crw", context=cfg["ctx"], topk=cfg["topk"], tau=cfg["temp"], radius=cfg["radius"])
        label = data["first_label"]
        padded = [propagate.source_frames(t, protocol.rule) for t in range(len(data["feats"]))]
        np.testing.assert_array_equal(padded, np.maximum(data["context_index"] - cfg["ctx"], 0))
        first, ids = first_labels(label, (cfg["h"], cfg["w"]), protocol)
        np.testing.assert_allclose(first.movedim(0, -1).numpy(), data["first_soft"], atol=2e-6, rtol=0)
        soft = soft_labels(data, first, protocol.rule)
        check(name, soft.transpose(0, 2, 3, 1), data["soft"][1:])
        found = hard(first, soft, ids, label.shape, label.shape, protocol)
        np.testing.assert_array_equal(np.stack(found), data["pred"], err_msg=name)


@pytest.mark.parametrize("method", ["dino", "uvc"])
def test_dino_and_uvc(golden: Path, way: str, method: str) -> None:
    for name, data, cfg in cases(golden, method):
        more = {"radius": cfg["radius"]} if "radius" in cfg else {}
        protocol = changed(method, context=cfg["ctx"], topk=cfg["topk"], tau=cfg["temp"], **more)
        label = data["first_label"]
        first, ids = first_labels(label, (cfg["h"], cfg["w"]), protocol)
        np.testing.assert_array_equal(first.numpy(), data["first_soft"])
        soft = soft_labels(data, first, protocol.rule)
        check(name, soft, data["soft"])
        size = cfg["h"] * cfg["stride"], cfg["w"] * cfg["stride"]
        found = hard(first, soft, ids, size, label.shape, protocol)
        np.testing.assert_array_equal(np.stack([label, *found[1:]]), data["pred"], err_msg=name)


def test_a_label_map_read_back_is_the_same(golden: Path, tmp_path: Path) -> None:
    for _, data in family(golden, "palette"):
        ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
        (tmp_path / "00000.png").write_bytes(label_map_bytes(ids))
        with Image.open(tmp_path / "00000.png") as image:
            assert image.mode == "P"
            np.testing.assert_array_equal(np.array(image), ids)
            assert image.getpalette() == data["palette"].ravel().tolist()
