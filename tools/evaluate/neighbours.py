"""A picture of some test records beside their nearest training records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.loader import LoaderConfig
from clipmill.tools.evaluate.frozen import Frozen
from clipmill.tools.evaluate.pictures import strip_picture, thumbnails

STRIP_FILE = "neighbours.png"
_COLUMNS = 8


def neighbour_strip(
    path: Path, data: Frozen, numbers: np.ndarray, similarity: np.ndarray, count: int, loader: LoaderConfig
) -> None:
    """Write a PNG of ``count`` test records, each with its nearest training records.

    numbers, similarity: (N, k) of all test records, nearest first. Which records are shown depends on their number
    only.
    """
    columns = min(_COLUMNS, numbers.shape[1])
    count = min(count, len(data.test))
    chosen = np.array(sorted(Draws(len(data.test), "strip").distinct(len(data.test), count)))
    near = numbers[chosen, :columns]
    queries = thumbnails(data.test, chosen, loader)
    neighbours = thumbnails(data.train, near.reshape(-1), loader)
    label, near_label = data.unseen.label[chosen], data.seen.label[near]
    titles = [
        [data.classes[label[row]]]
        + [f"{similarity[chosen[row], i]:.2f} {data.classes[near_label[row, i]]}" for i in range(columns)]
        for row in range(count)
    ]
    shape = (count, columns, *queries.shape[1:])
    strip_picture(path, queries, list(neighbours.reshape(shape)), titles, near_label == label[:, None])
