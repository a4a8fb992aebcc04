"""The Decoder protocol, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

import numpy as np

from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import ShardReader

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
Emit = Callable[[int, Planes], None]


class DecodeError(ValueError):
    """A record whose bytes do not decode to the frames the index promises."""


class Decoder(Protocol):
    """Turns packets into planes. One object per thread; it keeps its codec contexts between calls.

    seconds: time spent reading, accumulated over calls (the caller times the rest). decoded: frames decoded.
    """

    read_s: float
    decoded: int

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """Call ``emit(number, (y, u, v))`` once for each of the ``frames`` (sorted, distinct).

        y: (height, width) uint8; u, v: (height / 2, width / 2) uint8; valid only during the call. Raises DecodeError
        or ShardError when a frame cannot be produced; then some frames may have been emitted.
        """
        ...


def new_decoder(name: str, reader: ShardReader) -> Decoder:
    """A decoder of the backend ``name``, a module of this folder."""
    try:
        module = import_module(f"clipmill.pipeline.decode.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"decoder {name!r} is not available ({error}); `clipmill doctor` lists those that work"
        ) from error
    return module.new(reader)
