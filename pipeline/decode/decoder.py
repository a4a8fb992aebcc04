"""The Decoder protocol, and how one is found by its name.

Every backend gives the same frames for the same numbers. They differ in how they get them:

| backend | codecs | planes |
|---|---|---|
| ``pyav`` | all of FFmpeg's | the codec's own: the reference |
| ``libav`` | all of FFmpeg's | the same, from compiled code |
| ``raw`` | raw | the stored bytes |
| ``jpeg`` | mjpeg | within 1 level of the reference (JPEG does not fix how its transform is rounded) |
| ``auto`` | all | ``raw`` for its codec, ``libav`` for the others, ``pyav`` where that does not work |
| ``nvdec`` | h264, hevc, libdav1d (AV1) | the codec's own |
| ``torchcodec``, ``torchcodec_cuda``, ``decord``, ``dali`` | h264, hevc, libdav1d, mjpeg | converted back from RGB |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
Emit = Callable[[int, Planes], None]


class DecodeError(ValueError):
    """A record whose bytes do not decode to the frames the index promises."""


class UnsupportedCodecError(ValueError):
    """A record of a codec that a backend does not take: the wrong choice of backend, not a damaged record."""


class Decoder(Protocol):
    """Turns packets into planes. One object per thread; it keeps its codec contexts between calls.

    Planes are always in host memory, where the slot is. A backend that writes regions into it by itself has a method
    ``fill`` as well, see `clipmill.pipeline.decode.targets`.
    """

    @property
    def read_s(self) -> float:
        """Seconds spent reading so far."""
        ...

    @property
    def decoded(self) -> int:
        """Frames decoded so far."""
        ...

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """Call ``emit(number, (y, u, v))`` once for each of the ``frames`` (sorted, distinct).

        y: (height, width) uint8; u, v: (height / 2, width / 2) uint8; valid only during the call. Raises DecodeError
        or ShardError when a frame cannot be produced; then some frames may have been emitted. Raises
        UnsupportedCodecError for a record that this backend cannot take at all.
        """
        ...


def new_decoder(name: str, reader: Reader) -> Decoder:
    """A decoder of the backend ``name``, a module of this folder.

    Raises ValueError for a name that does not exist or whose libraries do not work here, with the remedy.

    >>> from clipmill.pipeline.shard import ShardReader
    >>> new_decoder("vhs", ShardReader())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no decoder 'vhs'; choose from auto, dali, ...
    """
    if name not in backends():
        raise ValueError(f"no decoder {name!r}; choose from {', '.join(backends())}")
    try:
        return import_module(f"clipmill.pipeline.decode.{name}").new(reader)
    except ImportError as error:
        extra = name.removesuffix("_cuda")
        remedy = f"pip install 'clipmill[{extra}]', or " if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(
            f"decoder {name!r} does not work here ({error}); {remedy}choose one of those that `clipmill doctor` finds"
        ) from error


def backends() -> list[str]:
    """Names of all backends, installed or not: the modules of this folder that have a function ``new``."""
    folders = import_module("clipmill.pipeline.decode").__path__
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if "\ndef new(reader" in "\n" + path.read_text("utf-8"))


def check(name: str, record: VideoRecord, frames: Sequence[int], codecs: Collection[str]) -> None:
    """Raise what `Decoder.decode` promises for a codec not among ``codecs`` and for frames that do not exist."""
    if record.codec.codec not in codecs:
        raise UnsupportedCodecError(
            f"{record.shard}: {record.key!r} is {record.codec.codec}, decoder {name!r} takes {', '.join(codecs)}; "
            "choose decoder 'auto'"
        )
    if frames[0] < 0 or frames[-1] >= record.num_frames:
        raise DecodeError(f"{record.shard}: {record.key!r}: frames {frames[0]}..{frames[-1]} of {record.num_frames}")
