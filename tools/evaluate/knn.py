"""Weighted k-nearest-neighbour classification of frozen features.

The classifier of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018),
section 3.4: the k training records nearest by cosine vote for their class with weight exp(similarity / temperature).
Nothing is trained, so it shows what the features alone hold. The paper takes k = 200, temperature 0.07.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.classification import classification
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.frozen import frozen_features
from clipmill.tools.evaluate.neighbours import STRIP_FILE, neighbour_strip
from clipmill.tools.evaluate.splits import Splits
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import hit_rates, retrieve

HIT_RATES = (1, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the kNN classifier."""

    k: int = 20
    """Neighbours that vote; at most as many as there are training records."""
    temperature: float = 0.07
    """Divides the similarity in a vote's exponent."""
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
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(f"k must be at least 1 and temperature positive, got {self.k} and {self.temperature}")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Classify the test split by its neighbours in the training split. See `Evaluator`.

    Besides accuracies, the report has the hit rates R@k of the same ranking: a test record counts if one of its k
    nearest training records has its class.
    """
    data = frozen_features(encoder, root, out, config, keep_views=config.unit_clips, progress=progress)
    gallery, query = (part.pooled(config.unit_clips) for part in (data.seen, data.unseen))
    numbers, similarity = retrieve(query, gallery, max(config.k, *HIT_RATES), centre=config.centre)
    near_labels = data.seen.label[numbers]
    k = min(config.k, len(gallery))
    votes = vote(near_labels[:, :k], similarity[:, :k], len(data.classes), config.temperature)
    outcome = classification(votes, data.test, data.classes, out)
    depths = [depth for depth in HIT_RATES if depth <= len(gallery)]
    rates = hit_rates(near_labels, data.unseen.label, depths)
    artefacts = list(outcome.artefacts)
    if config.pictures > 0:
        neighbour_strip(out / STRIP_FILE, data, numbers, similarity, config.pictures, config.compute.loader)
        artefacts.append(STRIP_FILE)
    return Report(
        benchmark="knn",
        metrics=outcome.metrics | {f"r@{depth}": rate for depth, rate in zip(depths, rates, strict=True)},
        rows=outcome.rows,
        artefacts=artefacts,
        settings=data.settings | {"k_used": k},
        digests=data.digests,
    )


def vote(labels_Nk: np.ndarray, similarity_Nk: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """Shares of the weighted votes per class, (N, K), from each record's neighbours."""
    weights = np.exp((similarity_Nk - similarity_Nk.max(1, keepdims=True)) / temperature)  # shares stay the same
    votes = np.zeros((len(labels_Nk), num_classes))
    np.add.at(votes, (np.arange(len(labels_Nk))[:, None], labels_Nk), weights)
    return votes / votes.sum(1, keepdims=True)
