"""Published numbers stand beside ours: they have our metrics' names and scale, and are of the same corpus."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from clipmill.tools.evaluate import localisation, otb, segmentation, semantic_segmentation, sound
from clipmill.tools.evaluate.presets import PUBLISHED_DAVIS
from clipmill.tools.evaluate.published import corpus_of, published

UCF101 = ["ApplyEyeMakeup", *(f"Class{number}" for number in range(99)), "YoYo"]
HMDB51 = ["brush_hair", *(f"class{number}" for number in range(49)), "wave"]
KINETICS = ["abseiling", *(f"class {number}" for number in range(398)), "zumba"]


def test_rows_are_of_the_corpus() -> None:
    assert [corpus_of(names) for names in (UCF101, HMDB51, KINETICS, UCF101[:-1], [])] == [
        "UCF101",
        "HMDB51",
        "Kinetics-400",
        "",
        "",
    ]
    tuned = {row["method"]: row["top1"] for row in published("finetune", UCF101)}
    assert tuned["VCLR, R50 TSN, Kinetics-400"] == 0.856
    assert tuned["XDC, R(2+1)D-18, AudioSet"] == 0.930
    assert {row["r@1"] for row in published("retrieval", HMDB51)} == {0.352, 0.176}
    assert [row["top1"] for row in published("svm", KINETICS)] == [0.641, 0.619]
    assert published("finetune", KINETICS) == published("retrieval", ["a", "b"]) == published("knn", UCF101) == []


def test_the_real_class_lists_are_known(test_data: Path) -> None:
    folder = test_data / "data" / "split_lists"
    for name, corpus in (("ucf101", "UCF101"), ("hmdb51", "HMDB51"), ("kinetics", "Kinetics-400")):
        (path,) = folder.glob(f"{name}*label_map*.txt")
        assert corpus_of([line for line in path.read_text().splitlines() if line]) == corpus


@pytest.mark.parametrize(
    ("rows", "metrics", "most"),
    [
        ([*chain(*PUBLISHED_DAVIS.values())], {"J&F-Mean", "J-Mean", "F-Mean"}, 1),
        ([*chain(*otb.PUBLISHED.values())], {"success_auc", "precision_20px"}, 1),
        (semantic_segmentation.PUBLISHED["voc"], {"mIoU"}, 1),
        (sound._published(5, 50) + sound._published(1, 10), {"top1"}, 1),
        (localisation._PUBLISHED, {"auc", "ar@100", "map", "map@0.5", "map@0.75", "map@0.95"}, 100),
        (segmentation._PUBLISHED, {"f1@10", "f1@25", "f1@50", "edit", "mof"}, 100),
        (published("finetune", UCF101) + published("finetune", HMDB51), {"top1"}, 1),
    ],
)
def test_rows_have_the_names_and_the_scale_of_metrics(rows: list[dict], metrics: set[str], most: float) -> None:
    assert rows
    for row in rows:
        numbers = {name: value for name, value in row.items() if name not in ("method", "source")}
        assert set(numbers) <= metrics
        assert all(most / 20 < value <= most for value in numbers.values())
        assert row["method"]
        assert row["source"]
