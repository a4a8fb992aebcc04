"""What a method asks for (View), what was drawn for one record (Span), and the planners between them.

A planner is a small frozen object: ``planner(record, rng, draw)`` returns one `Span` per view of ``planner.views``.
It reads only the record's numbers, draws only from ``rng``, and so is a pure function of (seed, draw): every thread,
process and machine plans the same clips. ``planner.usable(index)`` says which records it can serve at all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.spec import AudioSpec, VideoSpec

Short = Literal["loop", "repeat", "skip"]
Silence = Literal["keep", "skip", "redraw", "zero"]
ATTEMPTS = 10  # windows of sound that `redraw` draws before it takes a silent one


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One tensor of the batch, as a method declares it.

    name: key in ``ClipBatch.video`` or ``.audio``. modality: ``video`` (B,C,T,H,W), ``image`` (the same with T = 1) or
    ``audio``. num_frames: T. stride: source frames between two frames of the clip; or fps: frames per second of the
    clip, picked by time (then stride is not used). duration_s: length of an audio view. augment: how raw pixels or
    samples become the tensor. group: views of one group share their random augmentation draws (default: none do).
    """

    name: str
    modality: Literal["video", "audio", "image"] = "video"
    num_frames: int = 1
    stride: int = 1
    fps: float | None = None
    duration_s: float = 0.0
    augment: VideoSpec | AudioSpec = field(default_factory=VideoSpec)
    group: str = ""

    def __post_init__(self) -> None:
        audio = self.modality == "audio"
        if audio != isinstance(self.augment, AudioSpec):
            raise ValueError(f"view {self.name!r}: modality {self.modality} does not fit {type(self.augment).__name__}")
        if audio and self.duration_s <= 0:
            raise ValueError(f"view {self.name!r}: an audio view needs duration_s > 0, got {self.duration_s}")
        if self.num_frames < 1 or self.stride < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"view {self.name!r}: num_frames, stride and fps must be positive")

    @property
    def key(self) -> str:
        """The name that keys this view's augmentation draws."""
        return self.group or self.name

    def step(self, record: VideoRecord) -> float:
        """Source frames between two frames of this view (not an integer when ``fps`` is set)."""
        return float(self.stride) if self.fps is None else float(record.fps) / self.fps

    def extent(self, record: VideoRecord) -> int:
        """Source frames from the first to the last frame of this view, both included."""
        return int((self.num_frames - 1) * self.step(record) + 1e-6) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What to read of one record for one view: frame numbers, or a range of samples.

    frames: source frame numbers in the order of the clip (repeats allowed). start_sample, num_samples: of the audio
    track, may reach beyond it (zeros there). start_s: time of the first frame or sample.
    """

    view: str
    frames: tuple[int, ...] = ()
    start_sample: int = 0
    num_samples: int = 0
    start_s: float = 0.0


class Planner(Protocol):
    """How the spans of one record are drawn.

    Every span of one view has the same number of frames or seconds, whatever the record.
    """

    @property
    def views(self) -> tuple[View, ...]:
        """The views, with distinct names."""
        ...

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """Draw one span per view, in the order of ``views``; ``draw`` is the number the randomness is keyed by."""
        ...

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Boolean mask of the records this planner can serve."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """A planner's answer: the spans, and small numbers that travel with the sample (e.g. an order label)."""

    spans: tuple[Span, ...]
    aux: Mapping[str, float] = field(default_factory=dict)


# --- frame arithmetic ---------------------------------------------------------------------------------------


def within(frames: np.ndarray, num_frames: int, short: Short) -> tuple[int, ...]:
    """Bring frame numbers into [0, num_frames): ``loop`` wraps around, ``repeat`` holds the last frame."""
    frames = frames % num_frames if short == "loop" else np.clip(frames, 0, num_frames - 1)
    return tuple(frames.tolist())


def time_of(record: VideoRecord, frame: int) -> float:
    """When a frame begins, in seconds; the nearest float, as of the fraction."""
    return frame * record.fps.denominator / record.fps.numerator


def clip_span(view: View, record: VideoRecord, start: int, short: Short = "loop") -> Span:
    """The span of ``view`` that begins at frame ``start``."""
    if view.fps is None:
        numbers = range(start, start + view.num_frames * view.stride, view.stride)
        inside = start >= 0 and numbers[-1] < record.num_frames
        frames = tuple(numbers) if inside else within(np.array(numbers), record.num_frames, short)
    else:  # frame at each instant start + k / fps, the one shown at that time
        numbers = start + (np.arange(view.num_frames) * view.step(record) + 1e-6).astype(np.int64)
        frames = within(numbers, record.num_frames, short)
    return Span(view=view.name, frames=frames, start_s=time_of(record, start))


def audio_span(view: View, record: VideoRecord, start_s: float) -> Span:
    """The span of an audio view that begins at ``start_s`` seconds (at the nearest sample)."""
    hz = sound_hz(view, record)
    count = round(view.duration_s * hz)
    start = round(start_s * hz)
    return Span(view=view.name, start_sample=start, num_samples=count, start_s=start_s)


def random_start(view: View, record: VideoRecord, rng: Draws) -> int:
    """A start frame, uniform over all that keep the view inside the video; 0 when it is too short."""
    return rng.integer(max(record.num_frames - view.extent(record), 0) + 1)


def _long_enough(index: ShardIndex, views: Sequence[View], short: Short) -> np.ndarray:
    num_frames = index.column("num_frames").astype(np.int64)
    mask = num_frames > 0
    if short == "skip":
        fps = index.column("fps_num") / np.maximum(index.column("fps_den"), 1)
        for view in views:
            step = np.full(len(fps), float(view.stride)) if view.fps is None else fps / view.fps
            mask &= num_frames > ((view.num_frames - 1) * step + 1e-6).astype(np.int64)
    return mask


# --- silence: read from the index alone, so that planners stay pure functions of the record's numbers ---------


def sound_mask(index: ShardIndex, silence: Silence, views: Sequence[View]) -> np.ndarray:
    """Records that may be drawn from under a policy; a boolean mask.

    keep: all with sound. skip, redraw: those whose sound is not silent throughout. zero: all; missing sound is zeros,
    which needs sound that is packed at the views' rate.
    """
    if silence != "zero":
        mask = index.column("num_samples") > 0
        return mask if silence == "keep" else mask & (index.column("silent") == 0)
    rates = set(np.unique(index.column("audio_hz")).tolist()) - {0}
    for view in views:
        assert isinstance(view.augment, AudioSpec)
        if rates - {view.augment.hz}:
            raise ValueError(
                f"{index.root}: sound is packed at {sorted(rates)} Hz, view {view.name!r} wants {view.augment.hz} Hz; "
                "to put zeros where there is none they must agree: pack with that --audio-hz"
            )
    return np.ones(len(index), bool)


def sound_hz(view: View, record: VideoRecord) -> int:
    """The rate of a record's samples; the view's where it has none."""
    assert isinstance(view.augment, AudioSpec)
    return record.audio_hz or view.augment.hz


def is_silent(record: VideoRecord, span: Span) -> bool:
    """Every block of sound that the span touches has the checksum of zeros. Outside the track all is silent."""
    low, high = max(span.start_sample, 0), min(span.start_sample + span.num_samples, record.num_samples)
    if low >= high:
        return True
    first, last = low // AUDIO_BLOCK, (high - 1) // AUDIO_BLOCK
    return all(
        int(record.audio_crcs[block]) == _crc_of_zeros(min(AUDIO_BLOCK, record.num_samples - block * AUDIO_BLOCK))
        for block in range(first, last + 1)
    )


def audible(record: VideoRecord, silence: Silence, draw: Callable[[], tuple[Span, ...]]) -> tuple[Span, ...]:
    """What ``draw`` gives; under ``redraw`` the first of up to 10 answers in which no window of sound is silent."""
    spans = draw()
    for _ in range(ATTEMPTS - 1 if silence == "redraw" else 0):
        if not any(span.num_samples and is_silent(record, span) for span in spans):
            break
        spans = draw()
    return spans


@lru_cache(maxsize=1024)
def _crc_of_zeros(num_samples: int) -> int:
    return zlib.crc32(bytes(2 * num_samples))


# --- planners -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Random clips: all views begin at one frame (``shared``) or each at its own.

    short: what to do with a video shorter than a view: ``loop`` it, ``repeat`` its last frame, or ``skip`` it. Audio
    views, if any, begin with the first video view plus ``audio_jitter_s`` * U(-1, 1). silence: see `sound_mask`;
    redraw draws again, up to 10 times, where a window of sound is digital silence.
    """

    views: tuple[View, ...]
    shared: bool = True
    short: Short = "loop"
    audio_jitter_s: float = 0.0
    silence: Silence = "keep"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        return Drawn(audible(record, self.silence, lambda: self._draw(record, rng)))

    def _draw(self, record: VideoRecord, rng: Draws) -> tuple[Span, ...]:
        video = [view for view in self.views if view.modality != "audio"]
        longest = max(video, key=lambda view: view.extent(record))
        common = random_start(longest, record, rng)
        spans, first_s = [], None
        for view in self.views:
            if view.modality == "audio":
                jitter_s = self.audio_jitter_s * rng.uniform(-1.0, 1.0) if self.audio_jitter_s else 0.0
                start_s = (common / float(record.fps) if first_s is None else first_s) + jitter_s
                spans.append(audio_span(view, record, start_s))
                continue
            start = common if self.shared else random_start(view, record, rng)
            spans.append(clip_span(view, record, start, self.short))
            first_s = spans[-1].start_s if first_s is None else first_s
        return tuple(spans)

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames (enough of them if ``short`` is skip), and with sound if a view needs it."""
        video = [view for view in self.views if view.modality != "audio"]
        if not video:
            raise ValueError("Clips needs at least one video view")
        mask = _long_enough(index, video, self.short)
        if len(video) < len(self.views):
            mask &= sound_mask(index, self.silence, [view for view in self.views if view.modality == "audio"])
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Evaluation clips: ``clips`` starts evenly spread over the video, concatenated in time order per view.

    A view of T frames gives T * clips frames; starts are floor(i * (F - extent) / (clips - 1)), or the middle for one
    clip. Short videos loop. Deterministic: nothing is drawn. An audio view is the middle of the record. silence: which
    records are usable, see `sound_mask`; nothing is drawn again.
    """

    views: tuple[View, ...]
    clips: int = 1
    short: Short = "loop"
    silence: Silence = "keep"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        spans = []
        for view in self.views:
            if view.modality == "audio":
                if self.clips != 1:
                    raise ValueError("Uniform cuts one audio window per record; use clips=1")
                room_s = max(record.duration_s - view.duration_s, 0.0)
                spans.append(audio_span(view, record, room_s / 2))
                continue
            room = max(record.num_frames - view.extent(record), 0)
            starts = [room // 2] if self.clips == 1 else [i * room // (self.clips - 1) for i in range(self.clips)]
            parts = [clip_span(view, record, start, self.short) for start in starts]
            frames = tuple(frame for part in parts for frame in part.frames)
            spans.append(Span(view=view.name, frames=frames, start_s=parts[0].start_s))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records that have what the views need."""
        mask = np.ones(len(index), bool)
        if any(view.modality != "audio" for view in self.views):
            mask &= _long_enough(index, [view for view in self.views if view.modality != "audio"], self.short)
        if sound := [view for view in self.views if view.modality == "audio"]:
            mask &= sound_mask(index, self.silence, sound)
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """One frame from each of N equal segments of the whole video, N = the view's num_frames.

    With F frames, segment i is [i * F // N, (i + 1) * F // N). All views are drawn independently, except that
    ``distinct`` gives several views different frames of one segment where it has enough. ``middle`` takes the middle
    frame instead of a random one. A video with fewer frames than segments repeats frames.
    """

    views: tuple[View, ...]
    distinct: bool = False
    middle: bool = False

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        picks: list[list[int]] = [[] for _ in self.views]
        count = self.views[0].num_frames
        for segment in range(count):
            low = segment * record.num_frames // count
            room = max((segment + 1) * record.num_frames // count - low, 1)
            if self.middle:
                offsets = [room // 2] * len(self.views)
            elif self.distinct and room >= len(self.views):
                offsets = rng.distinct(room, len(self.views))
            else:
                offsets = [rng.integer(room) for _ in self.views]
            for pick, offset in zip(picks, offsets, strict=True):
                pick.append(min(low + offset, record.num_frames - 1))
        spans = [
            Span(view=view.name, frames=tuple(frames), start_s=time_of(record, frames[0]))
            for view, frames in zip(self.views, picks, strict=True)
        ]
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        counts = {view.num_frames for view in self.views}
        if len(counts) != 1:
            raise ValueError(f"Segments needs views with one common num_frames, got {sorted(counts)}")
        return index.column("num_frames") > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LongShort:
    """A long view and the short views that tile it.

    The first ``num_long`` views are long and share one clip; the next views are short: view i covers frames
    i*T_s .. (i+1)*T_s - 1 of the long clip. With ``starts`` view i begins at frame ``starts[i]`` of the long clip and
    goes on with its own stride, so that views may overlap or go slower. Videos shorter than the long clip loop.
    """

    views: tuple[View, ...]
    num_long: int = 1
    starts: tuple[int, ...] = ()

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        long = self.views[0]
        start = random_start(long, record, rng)
        whole = clip_span(long, record, start)
        spans = [replace(whole, view=view.name) for view in self.views[: self.num_long]]
        for view, first in zip(self.views[self.num_long :], self._starts(), strict=True):
            frames = whole.frames[first : first + view.num_frames]
            if self.starts:
                frames = clip_span(view, record, start + first * long.stride).frames
            spans.append(Span(view=view.name, frames=frames, start_s=time_of(record, frames[0])))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        long, short = self.views[0], self.views[self.num_long :]
        if any(view.num_frames != long.num_frames for view in self.views[: self.num_long]):
            raise ValueError("LongShort needs long views of one length")
        if len(self._starts()) != len(short):
            raise ValueError(f"{len(short)} short views need as many starts, got {self.starts}")
        if self.starts and any(view.fps is not None for view in (long, *short)):
            raise ValueError("LongShort with starts needs views with a stride, not with fps")
        for view, first in zip(short, self._starts(), strict=True):
            end = first + (view.num_frames - 1) * (view.stride / long.stride if self.starts else 1) + 1
            if first < 0 or end > long.num_frames:
                raise ValueError(f"the short views cover {end:g} frames, the long view has {long.num_frames}")
        return index.column("num_frames") > 0

    def _starts(self) -> tuple[int, ...]:
        if self.starts:
            return self.starts
        lengths = [view.num_frames for view in self.views[self.num_long :]]
        return tuple(sum(lengths[:number]) for number in range(len(lengths)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """One random window of sound per view, for records without or regardless of pictures. silence: as in `Clips`."""

    views: tuple[View, ...]
    silence: Silence = "keep"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        return Drawn(audible(record, self.silence, lambda: self._draw(record, rng)))

    def _draw(self, record: VideoRecord, rng: Draws) -> tuple[Span, ...]:
        length_s = record.num_samples / max(record.audio_hz, 1)
        return tuple(
            audio_span(view, record, rng.uniform(0.0, max(length_s - view.duration_s, 0.0))) for view in self.views
        )

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with sound, as the policy wants it."""
        return sound_mask(index, self.silence, self.views)
