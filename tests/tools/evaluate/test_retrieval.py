from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.retrieval import Config, evaluate
from clipmill.tools.evaluate.views import Rounded, Views, rounded_starts


def test_a_report(bright: ShardIndex, colour: Any, compute: Compute, tmp_path: Path) -> None:
    # one grey level fills one line through the origin of colour space, so only centred features tell levels apart
    config = Config(ks=(1, 3, 99), centre=True, pictures=2, views=Views(clips=2, size=16), compute=compute)
    report = evaluate(colour, bright.root, tmp_path, config)
    assert report.benchmark == "retrieval"
    assert list(report.metrics) == ["r@1", "r@3"]  # 16 records are searched
    assert 0.4 < report.metrics["r@1"] <= report.metrics["r@3"]
    assert report.artefacts == ["neighbours.csv", "neighbours.png"]
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert min(picture.size) > 150
    assert sum(row["records"] for row in report.rows) == 8
    hits = sum(row["r@1"] * row["records"] for row in report.rows)
    assert hits / 8 == pytest.approx(report.metrics["r@1"])
    with (tmp_path / "neighbours.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == bright.split("test").column("key").tolist()
    assert np.mean([row["class"] == row["class1"] for row in rows]) == pytest.approx(report.metrics["r@1"])
    assert {row["near1"] for row in rows} <= set(bright.split("train").column("key").tolist())
    similarities = [float(row[f"similarity{place}"]) for row in rows[:1] for place in range(1, 6)]
    assert similarities == sorted(similarities, reverse=True)
    assert not report.published  # of UCF101 and HMDB51


def test_options_that_cannot_be(bright: ShardIndex, colour: Any, compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ks must be rising numbers from 1 on, got \(5, 1\)"):
        Config(ks=(5, 1))
    config = Config(ks=(50,), views=Views(clips=1, size=16), compute=compute)
    with pytest.raises(ValueError, match=r"16 training records are fewer than ks \(50,\)"):
        evaluate(colour, bright.root, tmp_path, config)


def test_rounded_clips_reach_from_the_first_frame_to_the_last() -> None:
    assert rounded_starts(299, 30).tolist()[:3] == [0, 10, 21]
    assert rounded_starts(4, 9).tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 4]  # halves go to the even number, from 1
    record = cast(VideoRecord, SimpleNamespace(num_frames=20, fps=Fraction(25)))
    view = View(name="clip", num_frames=2, stride=4)
    (span,) = Rounded(views=(view,), clips=3)(record, Draws(0), 0).spans
    assert span.frames == (0, 4, 7, 11, 15, 19)
