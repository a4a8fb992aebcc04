"""PackSettings: everything that changes what is written. How fast it is written (workers, limits) is not in it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

PROFILES = ("cpu", "gpu", "intra", "jpeg", "raw", "copy")
_FIXED = {  # what a profile leaves no choice about; 0: does not apply
    "intra": {"gop": 1}, "jpeg": {"gop": 1}, "raw": {"gop": 1, "quality": 0}, "copy": {"gop": 0, "quality": 0},
}  # fmt: skip
MAX_SIDE = 16384  # H.264 and JPEG both end there or soon after


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What the shards look like.

    profile: cpu (H.264 that decodes fast), gpu (HEVC Main, no B-frames), intra (H.264, key frames only), jpeg (one
    picture per frame, as JFIF has it: full range, BT.601), raw (I420, lossless) or copy (the source's packets as they
    are). gop: frames from one key frame to the next; intra, jpeg and raw have 1. quality: constant rate factor of x264
    and x265, lower is better and larger; for jpeg its quantiser is made to match. short_side: scale pictures down to
    this many pixels (even), None = keep; never upscaled. fps: force this frame rate in Hz, None = the source's.
    matrix: ``bt709`` converts all video to it, ``source`` keeps and records the source's. audio_hz: 0 leaves sound
    out. damage_budget: share of a file's packets that may be damaged for the undamaged part still to be kept.
    shard_clips, shard_gb: a shard is closed after so many sources or so many gigabytes of source files.
    """

    profile: str = "cpu"
    gop: int = 8
    quality: int = 20
    short_side: int | None = None
    fps: Fraction | None = None
    matrix: Literal["bt709", "source"] = "bt709"
    audio_hz: int = 16000
    damage_budget: float = 0.05
    shard_clips: int = 1000
    shard_gb: float = 4.0

    def __post_init__(self) -> None:
        checks = [
            (self.profile in PROFILES, "profile", f"one of {', '.join(PROFILES)}"),
            (1 <= self.gop <= 1000, "gop", "1 to 1000 frames"),
            (1 <= self.quality <= 51, "quality", "1 (best) to 51"),
            (self.short_side is None or (self.short_side >= 16 and self.short_side % 2 == 0), "short_side",
             "an even number of pixels from 16 up"),
            (self.fps is None or 0 < self.fps <= 1000, "fps", "between 0 and 1000 Hz"),
            (self.matrix in ("bt709", "source"), "matrix", "bt709 or source"),
            (self.audio_hz == 0 or 1000 <= self.audio_hz <= 192000, "audio_hz", "0 (no sound) or 1000 to 192000 Hz"),
            (0 <= self.damage_budget <= 1, "damage_budget", "a share from 0 to 1"),
            (self.shard_clips >= 1, "shard_clips", "at least 1"),
            (self.shard_gb > 0, "shard_gb", "more than 0 gigabytes"),
        ]  # fmt: skip
        for good, name, allowed in checks:
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} is not possible: give {allowed}")
        if self.profile == "copy" and (self.short_side is not None or self.fps is not None):
            raise ValueError("profile = copy keeps pictures and times as they are: leave short_side and fps out")
        for name, value in _FIXED.get(self.profile, {}).items():
            object.__setattr__(self, name, value)

    @property
    def full_range(self) -> bool:
        """Whether pictures are stored in the full range of 0 to 255."""
        return self.profile == "jpeg"

    @property
    def suffix(self) -> str:
        """Of the files with the picture track."""
        return ".yuv" if self.profile == "raw" else ".mp4"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; equal settings give equal forms."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"fps": None if self.fps is None else str(self.fps)}
