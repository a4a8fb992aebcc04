"""The fastest exact backend on the CPU for each record: ``raw`` for its codec, else ``libav``, else ``pyav``.

Their planes are bit-equal, so batches do not depend on which of them works on a machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipmill.pipeline.decode import targets as slots
from clipmill.pipeline.decode.decoder import Decoder, Emit, new_decoder
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader


def new(reader: Reader) -> Decoder:
    """The backend's constructor."""
    return AutoDecoder(reader)


class AutoDecoder:
    """Keeps one decoder of each backend that was needed so far."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._decoders: dict[str, Decoder | None] = {}  # None: does not work here

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return sum(decoder.read_s for decoder in self._decoders.values() if decoder is not None)

    @property
    def decoded(self) -> int:
        """Frames decoded."""
        return sum(decoder.decoded for decoder in self._decoders.values() if decoder is not None)

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        self._chosen(record).decode(record, frames, emit)

    def fill(self, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> float:
        """See `clipmill.pipeline.decode.targets.fill`."""
        return slots.fill(self._chosen(record), record, targets, payload)

    def _chosen(self, record: VideoRecord) -> Decoder:
        *better, last = preferred(record)
        for name in better:
            if name not in self._decoders:
                try:
                    self._decoders[name] = new_decoder(name, self._reader)
                except ValueError:
                    self._decoders[name] = None
            decoder = self._decoders[name]
            if decoder is not None:
                return decoder
        decoder = self._decoders.get(last) or new_decoder(last, self._reader)
        self._decoders[last] = decoder
        return decoder


def preferred(record: VideoRecord) -> tuple[str, ...]:
    """Backends for a record, fastest first; the last one works everywhere."""
    return ("raw",) if record.codec.codec == "raw" else ("libav", "pyav")
