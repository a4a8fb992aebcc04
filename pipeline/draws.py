"""Counter-based randomness: every number is a pure function of a key, never of what was drawn elsewhere.

A key is a tuple such as ``(seed, draw, view)``. The same key gives the same numbers on any machine, in any thread,
at any world size. The mixer is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), vectorised where a whole batch draws at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB
_TO_UNIT = 2.0**-53


def mix(x: int) -> int:
    """Scramble 64 bits (the SplitMix64 finaliser)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _C1) & _MASK
    x = ((x ^ (x >> 27)) * _C2) & _MASK
    return x ^ (x >> 31)


def fold(*parts: int | str) -> int:
    """Combine integers and names into one 64-bit key; the order of the parts matters.

    >>> fold(1, "query") == fold(1, "query"), fold(1, "query") == fold("query", 1)
    (True, False)
    """
    state = 0
    for part in parts:
        value = zlib.crc32(part.encode()) + 1 if isinstance(part, str) else part
        state = mix(state + _GOLDEN + mix(value))
    return state


class Draws:
    """A stream of numbers that belongs to one key.

    >>> a, b = Draws(7, 0, "crop"), Draws(7, 0, "crop")
    >>> a.uniform(0, 1) == b.uniform(0, 1)
    True
    """

    __slots__ = ("_state",)

    def __init__(self, *key: int | str) -> None:
        self._state = fold(*key)

    @staticmethod
    def of(keys: np.ndarray) -> list[Draws]:
        """One stream for each key that `fold_array` gave.

        >>> Draws.of(fold_array(np.array([fold(7, 0)], np.uint64), "crop"))[0].coin() == Draws(7, 0, "crop").coin()
        True
        """
        streams = [object.__new__(Draws) for _ in range(len(keys))]
        for stream, key in zip(streams, keys.tolist(), strict=True):
            stream._state = key
        return streams

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK
        return mix(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self._next() >> 11) * _TO_UNIT)

    def integer(self, high: int) -> int:
        """An integer in [0, high); ``high`` must be positive."""
        if high <= 0:
            raise ValueError(f"integer(high) needs high >= 1, got {high}")
        return ((self._next() >> 11) * high) >> 53

    def coin(self, probability: float = 0.5) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def distinct(self, high: int, count: int) -> list[int]:
        """``count`` distinct integers of [0, high), in random order."""
        if count > high:
            raise ValueError(f"cannot draw {count} distinct integers below {high}")
        chosen: dict[int, int] = {}
        result = []
        for position in range(count):  # a Fisher-Yates shuffle that stores only what it moved
            other = position + self.integer(high - position)
            result.append(chosen.get(other, other))
            chosen[other] = chosen.get(position, position)
        return result

    def shuffle(self, items: Iterable[int]) -> list[int]:
        """A random permutation of the items."""
        pool = list(items)
        return [pool[i] for i in self.distinct(len(pool), len(pool))]


def _mix_array(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_C1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_C2)
    return x ^ (x >> np.uint64(31))


def fold_array(keys: np.ndarray, *parts: int | str | np.ndarray) -> np.ndarray:
    """Fold more parts into an array of 64-bit keys; equals ``fold`` continued element by element.

    >>> int(fold_array(np.array([fold(3)], np.uint64), "crop")[0]) == fold(3, "crop")
    True
    """
    state = np.asarray(keys, np.uint64)
    for part in parts:
        if isinstance(part, np.ndarray):
            mixed = _mix_array(part.astype(np.uint64))
        else:
            mixed = np.uint64(mix(zlib.crc32(part.encode()) + 1 if isinstance(part, str) else part))
        with np.errstate(over="ignore"):
            state = _mix_array(state + np.uint64(_GOLDEN) + mixed)
    return state


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Floats in [0, 1), shape ``keys.shape + (count,)``: the first ``count`` numbers of each key's stream."""
    keys = np.asarray(keys, np.uint64)
    with np.errstate(over="ignore"):
        counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return (_mix_array(keys[..., None] + counters) >> np.uint64(11)).astype(np.float64) * _TO_UNIT
