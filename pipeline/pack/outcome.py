"""What becomes of one source: ok, salvaged (a part could be kept), rejected or duplicate, with a typed reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from clipmill.pipeline.codec import CodecConfig

Status = Literal["ok", "salvaged", "rejected"]

REASONS = {
    "missing": "the list names it, but there is no such file",
    "permission": "the file may not be read",
    "not_a_file": "a folder, pipe, socket or device",
    "empty": "zero bytes",
    "io": "the disk could not deliver it",
    "changed": "the file changed while it was read",
    "not_media": "neither a media container nor a picture",
    "wrong_type": "a picture under the name of a video, or the other way round",
    "unreadable": "a media file whose structure is damaged or cut off",
    "unsupported": "no decoder for what is in it",
    "no_stream": "neither a video nor an audio stream",
    "no_frames": "nothing in it decodes",
    "not_copyable": "cannot be kept as it is, as the profile `copy` wants; another profile takes it",
    "segment": "the part that was asked for lies outside the file",
    "too_small": "fewer pixels than the profile's encoder can take",
    "too_large": "more pixels or seconds than can be packed",
    "truncated": "the file ends early",
    "damaged": "packets that do not decode",
    "no_key_frame": "the stream starts between two key frames",
    "sound_damaged": "the sound does not decode",
    "duplicate": "the same content as an earlier source",
    "verify": "what was written does not decode to what went in",
    "timeout": "took longer than the limit",
    "memory": "needed more memory than the limit",
    "crash": "the process that read it died",
    "failed": "an unexpected error",
}


class Rejected(Exception):  # noqa: N818 - an outcome, not a failure of ours
    """Raised inside a task: this source cannot be packed. ``reason`` is a key of `REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An encoded picture track in a file of its own.

    path: the file. suffix: of the shard member, with dot. first_packet: byte of the first packet in the file, the
    others follow without a gap. sizes, crcs: (P,) uint32. presentation, keyframes: as in `VideoRecord`. psnr_db: of
    the decoded result against the normalised frames over all samples of Y, U and V; psnr_min_db: of the worst frame.
    """

    path: str
    suffix: str
    codec: CodecConfig
    num_frames: int
    fps: Fraction
    height: int
    width: int
    first_packet: int
    sizes: np.ndarray
    crcs: np.ndarray
    presentation: np.ndarray
    keyframes: np.ndarray
    psnr_db: float
    psnr_min_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A PCM16 mono WAV file with a 44-byte header. silent: digital silence. crcs: as `VideoRecord.audio_crcs`."""

    path: str
    num_samples: int
    audio_hz: int
    crcs: np.ndarray
    silent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a task hands back: small, the payloads stay in files. facts: JSON-ready, goes into the record's JSON."""

    number: int
    status: Status
    reason: str = ""
    detail: str = ""
    picture: Picture | None = None
    sound: Sound | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    digest: bytes = b""
