"""What the bytes of a record mean to a decoder; apart from the index, so that those who pack need no Arrow."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

AUDIO_BLOCK = 16384  # samples covered by one checksum of the audio track


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    """What a decoder must know before the first packet.

    codec: FFmpeg's decoder name, or ``raw`` for I420. extradata: parameter sets. matrix: YUV matrix, ``bt709``,
    ``bt601`` or ``bt2020``. full_range: True for 0..255 luma (JPEG), False for 16..235.
    """

    codec: str
    extradata: bytes = b""
    pix_fmt: str = "yuv420p"
    matrix: str = "bt709"
    full_range: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {**asdict(self), "extradata": base64.b64encode(self.extradata).decode()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CodecConfig:
        """The inverse of `to_json`."""
        return CodecConfig(**{**data, "extradata": base64.b64decode(data["extradata"])})
