"""k-means over the features of a whole corpus, what comes before it, and what is drawn from its labels.

Small problems are solved by Lloyd's iteration in float64, large ones by faiss in float32 where it is installed (extra
``faiss``). Both follow faiss's rule for empty clusters (Johnson et al., arXiv 1702.08734; `split_empty`), and agree in
their labels wherever no two centroids are as near to a point as float32 can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

EPS = 1 / 1024  # how far `split_empty` moves two centroids apart, relative to each coordinate
SMALL = 1 << 24  # N * k up to which Lloyd in float64 is used although faiss is there
_PAIRS = 1 << 22  # distances held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Outcome of `kmeans`.

    labels: (N,) int64, the nearest final centroid. centroids: (k, D). objective: for every iteration the sum of squared
    distances to the nearest centroid before the update. inertia: the same for ``labels``.
    """

    labels: np.ndarray
    centroids: np.ndarray
    objective: np.ndarray
    inertia: float


def kmeans(
    x_ND: np.ndarray, k: int, *, iterations: int = 20, seed: int = 0, init: np.ndarray | None = None
) -> Clusters:
    """Squared-L2 k-means from k distinct random rows, or from the rows numbered by ``init`` (k,).

    The same data, seed and machine give the same labels. Raises ValueError for more clusters than rows.
    """
    if not 1 <= k <= len(x_ND):
        raise ValueError(f"cannot make {k} clusters of {len(x_ND)} samples; use clusters from 1 to {len(x_ND)}")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(x_ND))[:k] if init is None else np.asarray(init)
    if len(x_ND) * k > SMALL and _faiss() is not None:
        return _faiss_kmeans(x_ND, x_ND[rows], iterations, seed)
    return lloyd(x_ND, x_ND[rows], iterations, rng)


def lloyd(x_ND: np.ndarray, centroids_KD: np.ndarray, iterations: int, rng: np.random.Generator) -> Clusters:
    """Lloyd's iteration in float64: assign, move every centroid to its mean, refill empty clusters; assign at last."""
    x, centroids = x_ND.astype(np.float64), centroids_KD.astype(np.float64)
    k, objective = len(centroids), []
    for _ in range(iterations):
        labels, distances = assign(x, centroids)
        objective.append(float(distances.sum()))
        sizes = np.bincount(labels, minlength=k)
        filled = sizes > 0
        starts = (np.cumsum(sizes) - sizes)[filled]
        sums = np.add.reduceat(x[np.argsort(labels, kind="stable")], starts)  # rows of one cluster lie together
        centroids[filled] = sums / sizes[filled, None]
        split_empty(centroids, sizes, rng)
    labels, distances = assign(x, centroids)
    return Clusters(labels=labels, centroids=centroids, objective=np.array(objective), inertia=float(distances.sum()))


def assign(x_ND: np.ndarray, centroids_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) number of the nearest centroid (the smaller of equals) and squared distance to it."""
    labels, distances = np.empty(len(x_ND), np.int64), np.empty(len(x_ND))
    squares = np.square(centroids_KD).sum(1)
    block = max(1, _PAIRS // len(centroids_KD))
    for start in range(0, len(x_ND), block):
        part = x_ND[start : start + block]
        table = squares - 2 * part @ centroids_KD.T
        near = table.argmin(1)
        labels[start : start + block] = near
        distances[start : start + block] = np.square(part - centroids_KD[near]).sum(1)
    return labels, distances


def split_empty(centroids_KD: np.ndarray, sizes_K: np.ndarray, rng: np.random.Generator) -> None:
    """Refill empty clusters in place: each gets a donor's centroid, and the two are moved apart (`split`).

    The donor is drawn with probability proportional to its size - 1, and gives half of its size away.
    """
    for empty in np.flatnonzero(sizes_K == 0):
        chance = np.maximum(sizes_K - 1, 0).astype(np.float64)
        if not chance.any():
            return  # every cluster has one member or none: nothing can be shared
        donor = int(rng.choice(len(sizes_K), p=chance / chance.sum()))
        centroids_KD[empty], centroids_KD[donor] = split(centroids_KD[donor])
        sizes_K[empty] = sizes_K[donor] // 2
        sizes_K[donor] -= sizes_K[empty]


def split(centroid_D: np.ndarray, eps: float = EPS) -> tuple[np.ndarray, np.ndarray]:
    """(new, donor) centroids: new is the donor's times 1 + eps in even coordinates and 1 - eps in odd ones.

    The donor moves the other way.
    """
    sign = np.where(np.arange(len(centroid_D)) % 2 == 0, eps, -eps).astype(centroid_D.dtype)
    return centroid_D * (1 + sign), centroid_D * (1 - sign)


def _faiss_kmeans(x_ND: np.ndarray, centroids_KD: np.ndarray, iterations: int, seed: int) -> Clusters:
    faiss = _faiss()
    x = np.ascontiguousarray(x_ND, np.float32)
    k, width = centroids_KD.shape
    job = faiss.Clustering(width, k)
    job.niter, job.seed = iterations, seed % (1 << 31)
    job.min_points_per_centroid, job.max_points_per_centroid = 1, max(1, -(-len(x) // k))  # all points, no sampling
    start = np.ascontiguousarray(centroids_KD, np.float32)
    faiss.copy_array_to_vector(start.reshape(-1), job.centroids)
    table = faiss.IndexFlatL2(width)
    job.train(x, table)
    distances, labels = table.search(x, 1)
    stats = job.iteration_stats
    objective = np.array([stats.at(number).obj for number in range(stats.size())])
    centroids = faiss.vector_to_array(job.centroids).reshape(k, width)
    return Clusters(
        labels=labels[:, 0].astype(np.int64),
        centroids=centroids,
        objective=objective,
        inertia=float(distances.sum(dtype=np.float64)),
    )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss


# --- before and after ---------------------------------------------------------------------------------------


def whiten(x_ND: np.ndarray, dim: int) -> np.ndarray:
    """(N, dim) float64: centred, on the ``dim`` first principal axes, each divided by its standard deviation.

    Rows are not normalised yet (`unit`). Axes without variance stay 0. Raises ValueError for more axes than D or N.
    """
    if not 1 <= dim <= min(x_ND.shape):
        raise ValueError(f"pca_dim = {dim} is not possible for {x_ND.shape[0]} features of {x_ND.shape[1]} numbers")
    x = x_ND.astype(np.float64)
    x = x - x.mean(0)
    values, axes = principal_axes(x, dim)
    good = values > 1e-12 * max(values[0], np.finfo(np.float64).tiny)
    return x @ axes * np.where(good, 1 / np.sqrt(np.where(good, values, 1.0)), 0.0)


def principal_axes(x_ND: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(dim,) largest eigenvalues of the covariance (divisor N) of centred rows, and (D, dim) its axes."""
    values, axes = np.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    return values[::-1][:dim], axes[:, ::-1][:, :dim]


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm; zero rows stay zero."""
    norm = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(norm > 0, norm, 1.0)


def balanced_epoch(labels: np.ndarray, size: int, rng: np.random.RandomState) -> np.ndarray:
    """(size,) sample numbers drawn uniformly over the clusters that occur in ``labels`` (N,), in random order.

    floor(size / clusters) + 1 of each, without replacement where it has more members than that; cut to ``size``
    (DeepCluster's ``UnifLabelSampler``). rng: numpy's legacy generator, whose stream the reference defines.
    """
    names = np.unique(labels)
    each = size // len(names) + 1
    drawn = []
    for name in names:
        members = np.flatnonzero(labels == name)
        drawn.append(rng.choice(members, each, replace=len(members) <= each))
    chosen = np.concatenate(drawn)
    rng.shuffle(chosen)
    return chosen[:size]


def balance_weights(labels: np.ndarray, k: int) -> np.ndarray:
    """(k,) weights inversely proportional to cluster size, whose mean over the samples is 1; 0 for empty clusters."""
    sizes = np.bincount(labels, minlength=k)
    filled = sizes > 0
    return np.where(filled, len(labels) / (filled.sum() * np.maximum(sizes, 1)), 0.0)


def nmi(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Normalised mutual information of two labelings, I(a; b) / mean(H(a), H(b)); 1 if both are constant."""
    table = np.zeros((int(a_N.max()) + 1, int(b_N.max()) + 1))
    np.add.at(table, (a_N, b_N), 1.0 / len(a_N))
    rows, columns = table.sum(1), table.sum(0)
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (rows, columns)]
    if max(entropies) == 0:
        return 1.0
    hit = table > 0
    mutual = (table[hit] * np.log(table[hit] / np.outer(rows, columns)[hit])).sum()
    return float(mutual / np.mean(entropies))
