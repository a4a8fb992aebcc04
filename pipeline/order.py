"""(seed, epoch) -> a permutation of the records, evaluated at any position without storing it.

The permutation is a keyed Feistel network over the next power of four, walked until it lands inside the range
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): constant memory at any size, and resuming
anywhere costs nothing. The loader's whole state is a `Cursor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipmill.pipeline.draws import fold, fold_array

_ROUNDS = 6


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map positions in [0, size) through the permutation of [0, size) that ``key`` selects.

    >>> sorted(permute(np.arange(10), 10, key=3).tolist()) == list(range(10))
    True
    """
    flat = np.array(positions, np.uint64).reshape(-1)
    if flat.size and int(flat.max()) >= size:
        raise ValueError(f"positions must lie in [0, {size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    outside = np.arange(flat.size)
    while outside.size:
        values = flat[outside]
        left, right = values >> shift, values & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (fold_array(right, fold(key, round_)) & mask)
        values = (left << shift) | right
        flat[outside] = values
        outside = outside[values >= size]
    return flat.astype(np.int64).reshape(np.shape(positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which record stands at which position of an epoch.

    num_records: records in the index. seed: of the run. shuffle: False keeps index order. repeat: how often an epoch
    visits every record (each visit is a draw of its own). picks: explicit record numbers that replace the
    permutation's range, e.g. a re-weighted epoch; they are shuffled too unless ``shuffle`` is False.
    """

    num_records: int
    seed: int = 0
    shuffle: bool = True
    repeat: int = 1
    picks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.num_records < 1:
            raise ValueError("an order needs at least one record; the selection is empty")
        if self.repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {self.repeat}")
        if self.picks is not None and (
            len(self.picks) == 0 or self.picks.min() < 0 or self.picks.max() >= self.num_records
        ):
            raise ValueError(f"picks must be record numbers in [0, {self.num_records}) and at least one")

    def __len__(self) -> int:
        return self.repeat * (self.num_records if self.picks is None else len(self.picks))

    def records(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Record numbers (int64) at the given positions of an epoch."""
        if self.shuffle:
            positions = permute(positions, len(self), fold(self.seed, epoch, "order"))
        slots = np.asarray(positions, np.int64) % (len(self) // self.repeat)
        return slots if self.picks is None else self.picks[slots]

    def draws(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Draw numbers (uint64) that key all randomness of these positions: epoch * length + position."""
        return np.uint64(epoch * len(self)) + np.asarray(positions).astype(np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The loader's whole state: the next global position of an epoch. Valid at any world size and thread count."""

    seed: int = 0
    epoch: int = 0
    position: int = 0
    index_digest: str = ""

    def check(self, index_digest: str) -> None:
        """Raise if this cursor belongs to another data set."""
        if self.index_digest and index_digest and self.index_digest != index_digest:
            raise ValueError(
                f"the checkpoint was made on data set {self.index_digest}, but the one given is {index_digest}; "
                "resume with the same shards or start a new run"
            )
