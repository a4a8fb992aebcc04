"""H.264 and HEVC packets in the form that hardware decoders read: every unit behind a start code (Annex B).

In an mp4 units are preceded by their length, and parameter sets lie in a configuration record (ISO/IEC 14496-15, avcC
and hvcC).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from clipmill.pipeline.codec import CodecConfig

_START = b"\0\0\0\1"


@dataclass(frozen=True, slots=True)
class AnnexB:
    """How packets of one codec configuration are converted.

    sets: parameter sets, to be put before a packet where decoding starts. length_bytes: size of the length before
    each unit, 0 where packets have start codes already.
    """

    sets: bytes
    length_bytes: int

    @staticmethod
    def of(codec: CodecConfig) -> AnnexB:
        """Read a codec's extradata; raises ValueError if it is cut off."""
        data = codec.extradata
        if codec.codec not in ("h264", "hevc"):
            return AnnexB(b"", 0)
        if data[:1] != b"\x01":
            return AnnexB(data, 0)
        try:
            units = list(_avcc(data) if codec.codec == "h264" else _hvcc(data))
            length = data[4 if codec.codec == "h264" else 21] & 3
        except (IndexError, struct.error) as error:
            raise ValueError(f"the parameter sets of {codec.codec} are cut off") from error
        return AnnexB(b"".join(_START + unit for unit in units), length + 1)

    def convert(self, packet: bytes | memoryview, first: bool) -> bytes:
        """The packet with start codes; raises ValueError if its units do not fill it exactly."""
        parts: list[bytes | memoryview] = [self.sets] if first else []
        if self.length_bytes == 0:
            return b"".join([*parts, packet])
        position = 0
        while position < len(packet):
            begin = position + self.length_bytes
            position = begin + int.from_bytes(packet[position:begin], "big")
            if position > len(packet):
                raise ValueError(f"a unit ends {position - len(packet)} bytes behind its packet")
            parts += [_START, packet[begin:position]]
        return b"".join(parts)


def _avcc(data: bytes) -> Iterator[bytes]:
    position = 5
    for mask in (31, 255):  # sequence, then picture parameter sets
        many = data[position] & mask
        position += 1
        for _ in range(many):
            position, unit = _unit(data, position)
            yield unit


def _hvcc(data: bytes) -> Iterator[bytes]:
    position = 23
    for _ in range(data[22]):
        (many,) = struct.unpack_from(">H", data, position + 1)
        position += 3
        for _ in range(many):
            position, unit = _unit(data, position)
            yield unit


def _unit(data: bytes, position: int) -> tuple[int, bytes]:
    (size,) = struct.unpack_from(">H", data, position)
    end = position + 2 + size
    if end > len(data):
        raise IndexError(end)
    return end, data[position + 2 : end]
