"""Views of sound beside pictures: two moments of one video in both streams, and sound views as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.sound_spec import AudioSpec, LogMel
from clipmill.pipeline.views import Drawn, Silence, Span, View, audible, sound_hz, sound_mask, within

Times = Literal["overlapped", "same", "adjacent", "random", "far_apart", "far_video", "far_audio"]

_WINDOW: dict[str, tuple[float, float]] = {  # length of the common window and start of the second view, in views
    "overlapped": (1.5, 0.5),
    "same": (1.0, 0.0),
    "adjacent": (2.0, 1.0),
}


# --- two moments of one video -------------------------------------------------------------------------------


def timed_frames(fps: float, num_frames: int, rate: float, start_s: float, duration_s: float) -> np.ndarray:
    """Source frames shown at start_s + k / rate, k = 0, 1, ..., of a video of ``num_frames`` at ``fps``.

    At most int(duration_s * rate) of them, and none in the last half frame of the window or behind the video's end.

    >>> timed_frames(25, 250, 16, 9.7, 0.75).tolist()
    [242, 244, 245, 247, 248]
    """
    stop_s = min(start_s + duration_s - 0.5 / fps, num_frames / fps)
    times_s = start_s + np.arange(int(duration_s * rate + 1e-9)) / rate
    return (times_s[times_s < stop_s] * fps).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoMoments:
    """Two clips and two windows of sound per record, each pair cut from one longer window (CrissCross). A `Planner`.

    video, audio: the two views of each stream; video views need ``fps``; without video views only sound is cut, also
    from records that have no pictures. times: how the two moments lie.

    - overlapped: the common window is 1.5 views long, views at its two ends. adjacent: 2 views long. same: 1.
      The sound's window begins at a ~ U over all that keep both windows inside; the pictures' window lies anywhere
      inside the sound's: v ~ U(a, min(a + sound window, end of video) - picture window).
    - random: two independent draws of "same".
    - far_apart: both streams begin together, the second moment half a video later. far_video, far_audio: so for one
      stream; the other shows one of the two moments, by a fair coin, in both views.

    A stream shorter than its window is taken whole from 0 (the last frame is held, sound ends in zeros) and the other
    one is placed by itself. silence: see `sound_mask`; redraw draws again, up to 10 times, where any of the two
    windows of sound is digital silence.
    """

    video: tuple[View, ...]
    audio: tuple[View, View]
    times: Times = "overlapped"
    silence: Silence = "skip"

    def __post_init__(self) -> None:
        if len(self.video) not in (0, 2):
            raise ValueError(f"two moments need two video views or none, got {len(self.video)}")
        for pair in filter(None, (self.video, self.audio)):
            if len({(view.num_frames, view.fps, view.duration_s) for view in pair}) != 1:
                raise ValueError(f"views {pair[0].name!r} and {pair[1].name!r} must have one length")
        if self.video and self.video[0].fps is None:
            raise ValueError(f"view {self.video[0].name!r} needs fps: clips are placed by time")

    @property
    def views(self) -> tuple[View, ...]:
        """Both video views, if any, then both audio views."""
        return (*self.video, *self.audio)

    @property
    def video_s(self) -> float:
        """Length of a clip in seconds; 0 without pictures."""
        return self.video[0].num_frames / (self.video[0].fps or 1.0) if self.video else 0.0

    @property
    def audio_s(self) -> float:
        """Length of a window of sound in seconds."""
        return self.audio[0].duration_s

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        return Drawn(audible(record, self.silence, lambda: self._draw(record, rng)))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with pictures, and sound as the policy wants it."""
        mask = sound_mask(index, self.silence, self.audio)
        return mask & (index.column("num_frames") > 0) if self.video else mask

    def _draw(self, record: VideoRecord, rng: Draws) -> tuple[Span, ...]:
        if self.times in _WINDOW:
            length, second = _WINDOW[self.times]
            video_s, audio_s = self._place(record, rng, length)
            return self._spans(record, length, [video_s] * 2, [audio_s] * 2, second)
        if self.times == "random":
            places = [self._place(record, rng, 1.0) for _ in range(2)]
            return self._spans(record, 1.0, [place[0] for place in places], [place[1] for place in places])
        whole_s = record.duration_s
        first_s = rng.uniform(0.0, max(whole_s / 2 - max(self.video_s, self.audio_s), 0.0))
        both = [first_s, first_s + whole_s / 2]
        one = [both[rng.integer(2)]] * 2
        video, audio = one if self.times == "far_audio" else both, one if self.times == "far_video" else both
        return self._spans(record, 1.0, video, audio)

    def _place(self, record: VideoRecord, rng: Draws, length: float) -> tuple[float, float]:
        """Starts in seconds of the windows of pictures and of sound, each ``length`` views long."""
        picture_s, sound_s = length * self.video_s, length * self.audio_s
        video_end, audio_end = record.duration_s, _sound_s(record)
        if video_end < picture_s or audio_end < sound_s:
            start_s = rng.uniform(0.0, max(audio_end - sound_s, 0.0))
            return rng.uniform(0.0, max(video_end - picture_s, 0.0)), start_s
        start_s = rng.uniform(0.0, min(audio_end - sound_s, video_end - picture_s))
        return rng.uniform(start_s, min(start_s + sound_s, video_end) - picture_s), start_s

    def _spans(
        self, record: VideoRecord, length: float, video_s: list[float], audio_s: list[float], second: float = 0.0
    ) -> tuple[Span, ...]:
        """Spans of windows that start at the given times; the second view starts ``second`` views into its window."""
        spans = []
        for view, start_s, share in zip(self.video, video_s, (0.0, second), strict=False):  # there may be none
            rate, count = view.fps or 1.0, view.num_frames
            offset, wanted = round(share * count), int(length * count + 1e-9)
            frames = timed_frames(float(record.fps), record.num_frames, rate, start_s, wanted / rate)
            frames = np.concatenate([frames, np.full(wanted - len(frames), frames[-1] if len(frames) else 0)])
            part = within(frames[offset : offset + count], record.num_frames, "repeat")
            spans.append(Span(view=view.name, frames=part, start_s=start_s + offset / rate))
        for view, start_s, offset_s in zip(self.audio, audio_s, (0.0, second * self.audio_s), strict=True):
            hz = sound_hz(view, record)
            start = round(start_s * hz) + round(offset_s * hz)
            samples = round(view.duration_s * hz)
            spans.append(Span(view=view.name, start_sample=start, num_samples=samples, start_s=start / hz))
        return tuple(spans)


def _sound_s(record: VideoRecord) -> float:
    """Length of the sound in seconds; of the pictures where there is none."""
    return record.num_samples / record.audio_hz if record.num_samples else record.duration_s


# --- sound views in files -----------------------------------------------------------------------------------


def audio_view_to_json(view: View) -> dict[str, Any]:
    """What has to be stored with an audio encoder so that its sound is prepared the same way later."""
    spec = view.augment
    if not isinstance(spec, AudioSpec):
        raise ValueError(f"view {view.name!r} is not an audio view")
    mel = asdict(spec.logmel) if spec.logmel is not None else None
    return {"duration_s": view.duration_s, "hz": spec.hz, "logmel": mel}


def audio_view_from_json(data: Mapping[str, Any]) -> View:
    """The inverse of `audio_view_to_json`, without random operators."""
    mel = LogMel(**data["logmel"]) if data["logmel"] is not None else None
    spec = AudioSpec(hz=data["hz"], logmel=mel)
    return View(name="window", modality="audio", duration_s=data["duration_s"], augment=spec)
