from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.dense import Dense
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.segmentation import Config, evaluate
from clipmill.tools.evaluate.segmentation_files import match_records, read_layout, read_recognition

CLASSES = ("dark", "grey", "light")
VIDEOS = [f"video_{number}" for number in range(6)]


@pytest.fixture(scope="module")
def labels(
    dataset: ShardIndex, frame_level: Callable[[int, int], int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Labels of every frame of the grey videos by brightness, which rises with time; two splits."""
    root = tmp_path_factory.mktemp("labels")
    (root / "groundTruth").mkdir()
    (root / "splits").mkdir()
    for number, video in enumerate(VIDEOS):
        levels = [frame_level(number, frame) for frame in range(dataset[number].num_frames)]
        names = [CLASSES[(level - 16) // 73] for level in levels]
        (root / "groundTruth" / f"{video}.txt").write_text("\n".join(names) + "\n")
    (root / "mapping.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(CLASSES)))
    for split, test in ((1, VIDEOS[:2]), (2, VIDEOS[2:4])):
        train = [video for video in VIDEOS if video not in test]
        (root / "splits" / f"train.split{split}.bundle").write_text("".join(f"{video}.txt\n" for video in train))
        (root / "splits" / f"test.split{split}.bundle").write_text("".join(f"{video}.txt\n" for video in test))
    return root


@pytest.fixture
def config(labels: Path, compute: Compute) -> Config:
    return Config(
        labels=labels,
        head="linear",
        epochs=60,
        lr=0.1,
        pictures=2,
        dense=Dense(frames=1, stride=1),
        compute=compute,
    )


def test_brightness_tells_the_labels(dataset: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    report = evaluate(colour, dataset.root, tmp_path, config)
    assert list(report.metrics) == ["f1@10", "f1@25", "f1@50", "edit", "mof"]
    assert report.metrics["mof"] > 75
    assert report.metrics["f1@10"] > 75
    assert [(row["split"], row["video"]) for row in report.rows] == [
        *((1, video) for video in VIDEOS[:2]),
        *((2, video) for video in VIDEOS[2:4]),
    ]
    assert report.rows[1]["frames"] == 41
    assert report.published == ()
    assert report.artefacts == ["results/split_1", "results/split_2", "timelines.png"]
    with Image.open(tmp_path / "timelines.png") as picture:
        assert picture.width > 500
    layout = read_layout(config.labels or tmp_path)
    found = read_recognition(tmp_path / "results" / "split_1" / "video_1", CLASSES)
    assert 100 * np.mean(found == layout.truth("video_1")) == pytest.approx(report.rows[1]["mof"])
    again = replace(config, score_only=tmp_path / "results")
    assert evaluate(None, dataset.root, tmp_path / "again", again).metrics == report.metrics


def test_the_same_from_the_cache_and_from_exported_features(
    dataset: ShardIndex, colour: Any, config: Config, tmp_path: Path
) -> None:
    config = replace(config, epochs=3, split=(2,), pictures=0)
    first = evaluate(colour, dataset.root, tmp_path, replace(config, export=True))
    seen = colour.seen
    assert seen == sum(40 + number for number in range(6))  # one clip per frame
    second = evaluate(colour, dataset.root, tmp_path, config)
    assert colour.seen == seen
    stored = np.load(tmp_path / "features" / "video_3.npy")
    assert (stored.shape, stored.dtype) == ((3, 43), np.float32)
    given = replace(config, features=tmp_path / "features")
    third = evaluate(colour, dataset.root, tmp_path / "given", given)
    assert first.metrics == second.metrics == third.metrics
    assert (tmp_path / "results/split_2/video_2").read_bytes() == (
        tmp_path / "given/results/split_2/video_2"
    ).read_bytes()


def test_a_multi_stage_head_on_every_second_frame(
    dataset: ShardIndex, colour: Any, config: Config, tmp_path: Path
) -> None:
    small = replace(config, head="mstcn", stages=2, layers=3, maps=8, lr=0.01, epochs=25, split=(1,), pictures=0)
    report = evaluate(colour, dataset.root, tmp_path, replace(small, dense=replace(config.dense, every=2)))
    assert colour.seen == sum(-(-(40 + number) // 2) for number in range(6))
    assert report.metrics["mof"] > 60
    assert len(read_recognition(tmp_path / "results" / "split_1" / "video_1", CLASSES)) == 41


def test_labels_may_be_a_few_frames_short(
    dataset: ShardIndex, colour: Any, config: Config, labels: Path, tmp_path: Path
) -> None:
    short = tmp_path / "labels"
    shutil.copytree(labels, short)
    path = short / "groundTruth" / "video_0.txt"
    path.write_text("\n".join(path.read_text().split("\n")[:33]) + "\n")
    report = evaluate(colour, dataset.root, tmp_path, replace(config, labels=short, epochs=1, split=(1,), pictures=0))
    assert report.rows[0]["frames"] == 33


def test_wrong_files_are_one_clear_error(
    dataset: ShardIndex, colour: Any, config: Config, labels: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "labels"
    shutil.copytree(labels, bad)
    config = replace(config, labels=bad, epochs=1, pictures=0)

    def fails(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(colour, dataset.root, tmp_path, replace(config, **changes))

    fails("no split 7; it has 1, 2", split=(7,))
    fails("no file video_0 with recognised labels", score_only=tmp_path)
    fails("video_0.npy: no such file", features=tmp_path)
    truth = bad / "groundTruth" / "video_0.txt"
    truth.write_text("dark\nblue\n")
    fails("class 'blue' is not in mapping.txt")
    (bad / "splits" / "test.split1.bundle").write_text("video_5.txt\n")
    fails("split 1 both trains and tests on 'video_5'")
    (bad / "splits" / "train.split1.bundle").write_text("video_9.txt\n")
    fails("no record fits the video 'video_9'")
    (bad / "mapping.txt").write_text("0 dark\n2 grey\n")
    fails("class numbers must run from 0 without a gap, they are .0, 2.")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        replace(config, epochs=0)


def test_videos_are_found_under_several_names() -> None:
    keys = ["P03/cam01/P03_milk", "P03/cam02/P03_milk", "rgb-01-1"]
    assert match_records(keys, ["P03_cam02_P03_milk", "rgb-01-1"], Path("x")) == [1, 2]
    with pytest.raises(ValueError, match="2 records fit the video 'P03_milk'"):
        match_records(keys, ["P03_milk"], Path("x"))
