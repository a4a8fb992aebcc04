"""Video retrieval by frozen features: whether one of the k nearest training records is of a test record's class.

The test split are the queries, the training split is searched, by cosine; nothing is trained. Used on UCF101 and
HMDB51 split 1 by D. Xu et al., "Self-supervised Spatiotemporal Learning via Video Clip Order Prediction" (CVPR 2019).
VCLR's protocol: --clips 30 --spacing rounded --size 224 --resize 256 for an encoder of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_csv
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.frozen import Frozen, frozen_features
from clipmill.tools.evaluate.neighbours import STRIP_FILE, neighbour_strip
from clipmill.tools.evaluate.published import published
from clipmill.tools.evaluate.splits import Splits
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import hit_rates, retrieve

NEIGHBOURS_FILE = "neighbours.csv"
_LISTED = 5  # neighbours of a record in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of retrieval."""

    ks: tuple[int, ...] = (1, 5, 10, 20, 50)
    """Numbers of neighbours looked at, k of R@k; those above the number of training records are left out."""
    unit_clips: bool = False
    """Scale the feature of every view to length 1 before averaging."""
    centre: bool = False
    """Subtract each split's mean feature, test statistics included (CoCLR); changes the ranking."""
    pictures: int = 8
    """Test records in the neighbour picture, 0 = no picture."""
    views: Views = field(default_factory=Views)
    splits: Splits = field(default_factory=Splits)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise ValueError(f"ks must be rising numbers from 1 on, got {self.ks}")
        if self.pictures < 0:
            raise ValueError(f"pictures must be at least 0, got {self.pictures}")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Rank the training split for every test record. See `Evaluator`. Rows: R@1 and the largest R@k by class."""
    data = frozen_features(encoder, root, out, config, keep_views=config.unit_clips, progress=progress)
    gallery, query = (part.pooled(config.unit_clips) for part in (data.seen, data.unseen))
    ks = [k for k in config.ks if k <= len(gallery)]
    if not ks:
        raise ValueError(f"{root}: {len(gallery)} training records are fewer than ks {config.ks}; use smaller --ks")
    numbers, similarity = retrieve(query, gallery, max(*ks, _LISTED), centre=config.centre)
    near_label = data.seen.label[numbers]
    rates = hit_rates(near_label, data.unseen.label, ks)
    write_csv(out / NEIGHBOURS_FILE, _listed(data, numbers, similarity))
    artefacts = [NEIGHBOURS_FILE]
    if config.pictures:
        neighbour_strip(out / STRIP_FILE, data, numbers, similarity, config.pictures, config.compute.loader)
        artefacts.append(STRIP_FILE)
    return Report(
        benchmark="retrieval",
        metrics={f"r@{k}": rate for k, rate in zip(ks, rates, strict=True)},
        rows=_by_class(data, near_label, ks),
        artefacts=artefacts,
        settings=data.settings,
        digests=data.digests,
        published=published("retrieval", data.classes),
    )


def _by_class(data: Frozen, near_label: np.ndarray, ks: list[int]) -> list[dict[str, Any]]:
    rows = []
    for label in np.unique(data.unseen.label):
        mine = data.unseen.label == label
        rates = hit_rates(near_label[mine], data.unseen.label[mine], ks)
        named = {f"r@{k}": rate for k, rate in zip(ks, rates, strict=True)}
        rows.append({"class": data.classes[label], "records": int(mine.sum()), **named})
    return rows


def _listed(data: Frozen, numbers: np.ndarray, similarity: np.ndarray) -> list[dict[str, Any]]:
    """One row per test record: its class and its nearest training records."""
    keys, near_keys = data.test.column("key"), data.train.column("key")
    rows = []
    for row, key in enumerate(keys.tolist()):
        found: dict[str, Any] = {"key": key, "class": data.classes[data.unseen.label[row]]}
        for place in range(min(_LISTED, numbers.shape[1])):
            number = numbers[row, place]
            found[f"near{place + 1}"] = near_keys[number]
            found[f"class{place + 1}"] = data.classes[data.seen.label[number]]
            found[f"similarity{place + 1}"] = f"{similarity[row, place]:.6g}"
        rows.append(found)
    return rows
