"""The official splits of a UCF101 layout, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate import knn
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.over_splits import over_splits
from clipmill.tools.evaluate.splits import Splits, official_parts, split
from clipmill.tools.evaluate.views import Views

PARTS = [["train", "test", "test"], ["train", "train", "unused"], ["test", "train", "train"], ["test", "test", "train"]]


@pytest.fixture
def splits(bright: ShardIndex, relabel: Callable[..., ShardIndex], tmp_path: Path) -> ShardIndex:
    """The bright corpus with a manifest in which four records in turn have the parts of three splits."""
    labels = bright.column("label").tolist()
    index = relabel(bright, tmp_path / "splits", labels, [PARTS[n % 4][0] for n in range(len(bright))], ("a", "b", "c"))
    extra = [
        json.dumps({"splits": {str(number + 1): part for number, part in enumerate(PARTS[n % 4])}})
        for n in range(len(index))
    ]
    rows = pa.table({"uid": pa.array(index.column("uid").tolist(), pa.uint64()), "extra": extra})
    parquet.write_table(rows.take(list(range(len(index) - 1, -1, -1))), index.root / "manifest.parquet")
    return index


@pytest.fixture
def config(compute: Compute) -> knn.Config:
    return knn.Config(k=3, views=Views(clips=2), splits=Splits(official=(1, 2, 3)), compute=compute, pictures=0)


def test_every_split_has_its_own_parts(splits: ShardIndex) -> None:
    for number in (1, 2, 3):
        wanted = [PARTS[n % 4][number - 1] for n in range(len(splits))]
        assert official_parts(splits, number).tolist() == wanted
        train, test = split(splits.root, Splits(official=(number,)))
        for part, name in ((train, "train"), (test, "test")):
            uids = splits.column("uid")[np.array(wanted) == name]
            assert part.column("uid").tolist() == uids.tolist()


def test_the_score_is_the_mean_and_features_are_computed_once(
    splits: ShardIndex, colour: Any, config: knn.Config, tmp_path: Path
) -> None:
    report = over_splits(knn.evaluate, colour, splits.root, tmp_path / "out", config)
    assert colour.seen == 2 * len(splits)
    alone = [
        knn.evaluate(colour, splits.root, tmp_path / str(n), replace(config, splits=Splits(official=(n,))))
        for n in (1, 2, 3)
    ]
    assert [row["split"] for row in report.rows] == [1, 2, 3]
    assert [row["top1"] for row in report.rows] == [one.metrics["top1"] for one in alone]
    assert report.metrics["top1"] == pytest.approx(np.mean([one.metrics["top1"] for one in alone]))
    assert report.settings["official_splits"] == [1, 2, 3]
    assert all((tmp_path / "out" / name).is_file() for name in report.artefacts)


def test_a_split_that_was_scored_is_not_evaluated_again(
    splits: ShardIndex, colour: Any, config: knn.Config, tmp_path: Path
) -> None:
    done: list[Path] = []

    def once(encoder: Any, root: Path, out: Path, options: knn.Config, *, progress: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(out)
        return knn.evaluate(encoder, root, out, options, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        over_splits(once, colour, splits.root, tmp_path / "out", config)
    done.pop(0)
    report = over_splits(once, colour, splits.root, tmp_path / "out", config)
    assert [path.name for path in done] == ["split_2", "split_3"]
    assert report.to_json() == over_splits(knn.evaluate, colour, splits.root, tmp_path / "whole", config).to_json()
    changed = replace(config, k=1)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        over_splits(once, colour, splits.root, tmp_path / "out", changed)
    assert [path.name for path in done] == ["split_1", "split_2"]


def test_a_corpus_without_the_split_is_one_clear_error(splits: ShardIndex, bright: ShardIndex) -> None:
    with pytest.raises(ValueError, match="no official split 4; it has 1, 2, 3"):
        split(splits.root, Splits(official=(4,)))
    with pytest.raises(ValueError, match=r"manifest.parquet: no such file; --official reads the splits there"):
        split(bright.root, Splits(official=(1,)))
    with pytest.raises(ValueError, match="give one split at a time"):
        split(splits.root, Splits(official=(1, 2)))
