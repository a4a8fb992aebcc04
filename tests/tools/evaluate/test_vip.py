from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.tools import cli
from clipmill.tools.evaluate.baselines import LabPatches
from clipmill.tools.evaluate.propagation import Maps, Overrides
from clipmill.tools.evaluate.vip import Config, confusion, evaluate, part_rows, part_scores

HEIGHT, WIDTH = 64, 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(root: Path, name: str = "videos1", frames: int = 3, speed: int = 0) -> None:
    """Three parts of plain colours, in cells of 16 pixels, that move to the right."""
    rng = np.random.default_rng(len(name))
    (root / "Images" / name).mkdir(parents=True)
    (root / "Annotations" / "Category_ids" / name).mkdir(parents=True)
    colours = rng.integers(0, 256, (20, 3))
    for t in range(frames):
        ids = np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, (top, left, part) in enumerate(((16, 16, 2), (32, 16, 13), (32, 48, 19))):
            ids[top : top + 16, left + speed * t : left + speed * t + 16 * (number + 1)] = part
        Image.fromarray(colours[ids].astype(np.uint8)).save(root / "Images" / name / f"{t:012d}.png")
        (root / "Annotations" / "Category_ids" / name / f"{t:012d}.png").write_bytes(label_map_bytes(ids))


def config(preset: str = "uvc", **options: object) -> Config:
    return Config(preset=preset, overrides=Overrides(size=64), maps=Maps(device="cpu"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["uvc", "contrastcorr", "crw", "vfs"])
def test_parts_of_a_static_video_stay(tmp_path: Path, preset: str) -> None:
    write(tmp_path)
    report = evaluate(LabPatches(), tmp_path, tmp_path / "out", config(preset))
    assert report.metrics["accuracy"] > 0.8  # without L2 normalisation raw colours are not very sharp
    assert [row["part"] for row in report.rows] == ["background", "hair", "face", "left-shoe"]
    assert report.metrics["mIoU"] == pytest.approx(np.mean([row["IoU"] for row in report.rows]))
    assert report.settings["first_frame"] == ("propagated" if preset == "crw" else "copied")
    for name in report.artefacts:
        assert (tmp_path / "out" / name).is_file(), name
    masks = sorted((tmp_path / "out" / "masks" / "videos1").iterdir())
    assert [path.name for path in masks] == [f"{t:012d}.png" for t in range(3)]
    given = (tmp_path / "Annotations" / "Category_ids" / "videos1" / masks[0].name).read_bytes()
    assert (masks[0].read_bytes() == given) == (preset != "crw")


def test_all_videos_share_one_matrix(tmp_path: Path) -> None:
    write(tmp_path, "videos1", frames=2, speed=8)
    write(tmp_path, "videos12", frames=4)
    report = evaluate(LabPatches(), tmp_path, tmp_path / "out", config())
    total = np.zeros((20, 20), np.int64)
    for path in (tmp_path / "Annotations" / "Category_ids").rglob("*.png"):
        found = tmp_path / "out" / "masks" / path.parent.name / path.name
        with Image.open(path) as truth, Image.open(found) as mask:
            total += confusion(np.array(truth), np.array(mask))
    assert report.metrics == part_scores(total)
    assert total.sum() == 6 * HEIGHT * WIDTH
    assert list(report.rows) == part_rows(total)


# --- the matrix ---------------------------------------------------------------------------------------------


def maps(seed: int, classes: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (30, 40)).astype(np.uint8)


def test_the_truth_is_perfect() -> None:
    assert part_scores(confusion(maps(0, 7), maps(0, 7))) == dict.fromkeys(
        ("mIoU", "accuracy", "mean_accuracy", "fw_IoU"), 1.0
    )


def test_relabelling_and_splitting_change_nothing() -> None:
    truth, found = maps(0), np.where(np.random.default_rng(2).random((30, 40)) < 0.7, maps(0), maps(1))
    matrix = confusion(truth, found)
    order = np.random.default_rng(3).permutation(20).astype(np.uint8)
    assert part_scores(confusion(order[truth], order[found])) == pytest.approx(part_scores(matrix))
    np.testing.assert_array_equal(confusion(truth[:11], found[:11]) + confusion(truth[11:], found[11:]), matrix)


def test_ignored_pixels_do_not_count() -> None:
    truth, found = maps(0), maps(1)
    more = np.concatenate([truth, np.full_like(truth, 255)]), np.concatenate([found, found])
    np.testing.assert_array_equal(confusion(*more), confusion(truth, found))


def test_a_class_counts_if_it_is_in_truth_or_prediction() -> None:
    truth, found = np.zeros((2, 4, 4), np.uint8)
    found[0, 0] = 5
    scores = part_scores(confusion(truth, found))
    assert scores["mIoU"] == pytest.approx((15 / 16 + 0) / 2)
    assert scores["mean_accuracy"] == 15 / 16
    rows = part_rows(confusion(truth, found))
    assert [(row["part"], row["accuracy"]) for row in rows] == [("background", 15 / 16), ("dress", None)]


def test_a_prediction_of_another_size_is_resized() -> None:
    small = maps(0)[:15, :20]
    np.testing.assert_array_equal(
        confusion(small.repeat(2, 0).repeat(2, 1), small), 4 * np.diag(np.bincount(small.ravel(), minlength=20))
    )


# --- broken input -------------------------------------------------------------------------------------------


def test_an_id_that_is_no_part(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "Annotations" / "Category_ids" / "videos1" / f"{1:012d}.png"
    path.write_bytes(label_map_bytes(np.full((HEIGHT, WIDTH), 33, np.uint8)))
    with pytest.raises(ValueError, match=r"000000000001\.png: id 33 is no part; ids are 0 to 19, and 255 is left out"):
        evaluate(LabPatches(), tmp_path, tmp_path / "out", config())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    command = ["evaluate", "vip", "baseline:lab", str(tmp_path), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*command, "--size", "64", "--device", "cpu"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["settings"]["protocol"]["rule"]["context"] == 1
    assert score == json.loads((tmp_path / "out" / "score.json").read_text())
