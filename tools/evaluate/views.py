"""What an encoder is shown of each record at test time: which moments, which crops, in which form.

`Views` are the user's options; `eval_views` makes of them, and of what the encoder was made for, a `EvalPlan`: a
planner for the loader that draws nothing. The arithmetic of the common protocols (mmaction's `SampleFrames` in test
mode, CoCLR's windows) stands here as pure functions; `crops` has that of crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from clipmill.models.encoder import InputSpec
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.spec import AudioSpec, CenterCrop, Crop, CutCenter, Flip, LogMel, Normalize, Op, VideoSpec
from clipmill.pipeline.views import (
    Drawn,
    Planner,
    Segments,
    Short,
    Span,
    Uniform,
    View,
    audio_span,
    clip_span,
    time_of,
    within,
)
from clipmill.tools.evaluate.crops import PlacedCrop

AUDIO_DURATION_S = 2.0  # where nothing else is known


# --- moments ------------------------------------------------------------------------------------------------


def sample_frames(
    num_frames: int, clip_len: int, interval: float, clips: int, *, twice: bool = False, short: Short = "loop"
) -> np.ndarray:
    """Frame numbers (clips, clip_len) of evenly spread test clips, mmaction's ``SampleFrames(test_mode=True)``.

    With span s = clip_len * interval and step = (num_frames - s + 1) / clips, clip i starts at i * step + step / 2;
    ``twice`` appends clips that start at i * step. A video shorter than s gives ``clips`` clips that start at 0.
    short: frames beyond the end ``loop`` around or ``repeat`` the last frame that the clip has.

    >>> sample_frames(90, 16, 2, 3)[:, 0].tolist(), sample_frames(3, 4, 1, 1, short="repeat").tolist()
    ([9, 29, 49], [[0, 1, 2, 2]])
    """
    span = clip_len * interval
    starts = np.zeros(clips)
    if num_frames > span - 1:
        step = (num_frames - span + 1) / clips
        base = np.arange(clips) * step
        starts = np.floor(base + step / 2)
        if twice:
            starts = np.concatenate([starts, base])
    offsets = np.floor(np.arange(clip_len) * interval + 1e-6)
    frames = starts[:, None] + offsets
    if short == "repeat":
        inside = frames < num_frames
        frames = np.where(inside, frames, (frames * inside).max(1, keepdims=True))
    else:
        frames = np.mod(frames, num_frames)
    return frames.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Test clips in the middle of equal parts of the video (`sample_frames`), concatenated per view. A `Planner`.

    A view of T frames gives T * clips frames, or T * 2 * clips with ``twice``; a video too short for the second set
    repeats its first. Nothing is drawn.
    """

    views: tuple[View, ...]
    clips: int = 1
    twice: bool = False
    short: Short = "loop"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        spans = []
        for view in self.views:
            frames = sample_frames(
                record.num_frames, view.num_frames, view.step(record), self.clips, twice=self.twice, short=self.short
            )
            if self.twice and len(frames) == self.clips:
                frames = np.concatenate([frames, frames])
            numbers = within(frames.reshape(-1), record.num_frames, "repeat")
            spans.append(Span(view=view.name, frames=numbers, start_s=time_of(record, numbers[0])))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0


def rounded_starts(last: int, clips: int) -> np.ndarray:
    """Evenly spread starts (clips,), 0 to ``last``; each is rounded to the nearest frame number, from 1, half to even.

    >>> rounded_starts(3, 3).tolist()  # 2.5 becomes frame 2
    [0, 1, 3]
    """
    return np.rint(np.linspace(1, last + 1, clips)).astype(np.int64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Test clips from the first to the last moment, at `rounded_starts`, concatenated per view. A `Planner`.

    VCLR's 30 single frames; a video of fewer frames repeats some. Nothing is drawn.
    """

    views: tuple[View, ...]
    clips: int = 1
    short: Short = "loop"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        spans = []
        for view in self.views:
            starts = rounded_starts(max(record.num_frames - view.extent(record), 0), self.clips)
            parts = [clip_span(view, record, start, self.short) for start in starts.tolist()]
            frames = tuple(frame for part in parts for frame in part.frames)
            spans.append(Span(view=view.name, frames=frames, start_s=parts[0].start_s))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """Clips that begin at given frames, all views of a draw at one. A `Planner`.

    first: (draws,) frame at which the clips of each draw begin, may lie outside the video.
    """

    views: tuple[View, ...]
    first: np.ndarray
    short: Short = "loop"

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        start = int(self.first[draw % len(self.first)])
        return Drawn(tuple(clip_span(view, record, start, self.short) for view in self.views))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with frames."""
        return index.column("num_frames") > 0


def overlapping_starts(num_frames: int, span: int) -> np.ndarray:
    """Starts of all windows of ``span`` frames that overlap by half and lie in the video (CoCLR's test clips).

    They are span / 2 - 1 apart. A video no longer than a window has one, at 0.

    >>> overlapping_starts(70, 32).tolist(), overlapping_starts(32, 32).tolist()
    ([0, 15, 30], [0])
    """
    return np.arange(0, max(num_frames - span, 0) + 1, max(span // 2 - 1, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """One window of sound per view, evenly spread over the record; a single one comes from the middle. A `Planner`."""

    views: tuple[View, ...]

    def __call__(self, record: VideoRecord, rng: Draws, draw: int) -> Drawn:
        """See `Planner`."""
        length_s = record.num_samples / record.audio_hz
        last = len(self.views) - 1
        spans = []
        for number, view in enumerate(self.views):
            room_s = max(length_s - view.duration_s, 0.0)
            spans.append(audio_span(view, record, room_s * number / last if last else room_s / 2))
        return Drawn(tuple(spans))

    def usable(self, index: ShardIndex) -> np.ndarray:
        """Records with sound."""
        return index.column("num_samples") > 0


# --- from options to a plan ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """What is shown of a record. An option left out is taken from what the encoder was made for."""

    clips: int = 4
    """Clips (or windows of sound) per record, evenly spread over its time."""
    spacing: Literal["uniform", "middle", "rounded", "segments", "overlap"] = "uniform"
    """uniform: the first clip begins with the video, the last ends with it, starts rounded down; rounded: the same,
    starts rounded to the nearest frame. middle: one in the middle of each part. segments: one clip, whose frames are
    the middle ones of equal parts of the video (TSM). overlap: all clips that overlap by half (CoCLR), however many
    the record has."""
    crops: Literal["centre", "three", "ten"] = "centre"
    """Crops per clip: centre; both ends and the middle; four corners and centre with their mirror images."""
    frames: int | None = None
    """Frames per clip."""
    stride: int | None = None
    """Source frames between two frames of a clip."""
    fps: float | None = None
    """Frames per second of a clip, instead of a stride."""
    size: int | None = None
    """Side of the input in pixels."""
    resize: int | None = None
    """Short side in pixels before cropping; default: size / 0.875, or size where three crops are taken."""
    centre_crop: Literal["resize", "cut"] = "resize"
    """Centre crop: resize, then cut (torchvision); or cut 0.875 of the short side, then resize that, bicubic and
    without low-pass filter (SimCLR)."""
    short: Literal["loop", "repeat"] = "loop"
    """Videos shorter than a clip start again, or hold their last frame."""
    duration_s: float | None = None
    """Seconds of sound per window, for audio encoders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    """How records become inputs.

    planner: for the loader. modality: ``video`` or ``audio``. clips, crops: inputs per visit of a record are
    clips * crops, clip by clip. A video view of the planner holds the clips of one crop; an audio view is one window.
    overlap: a record is visited once for each window of `overlapping_starts`; else once.
    """

    planner: Planner
    modality: Literal["video", "audio"]
    clips: int
    crops: int
    overlap: bool = False

    @property
    def num_views(self) -> int:
        """Inputs per visit of a record."""
        return self.clips * self.crops

    def visits(self, index: ShardIndex) -> tuple[Planner, np.ndarray]:
        """The planner for one pass over ``index``, and the record of each visit, (visits,), in index order."""
        if not self.overlap:
            return self.planner, np.arange(len(index))
        assert isinstance(self.planner, Uniform)
        view = self.planner.views[0]
        starts = [overlapping_starts(one.num_frames, int(view.num_frames * view.step(one))) for one in index]
        planner = Placed(views=self.planner.views, first=np.concatenate(starts), short=self.planner.short)
        return planner, np.repeat(np.arange(len(index)), [len(each) for each in starts])


def eval_views(spec: InputSpec, options: Views, audio_view: View | None = None) -> EvalPlan:
    """The plan of an encoder's test views. audio_view: how its sound was prepared in training, if that is known."""
    if options.clips < 1:
        raise ValueError(f"clips must be at least 1, got {options.clips}")
    if spec.modality == "audio":
        window = plain_audio_view(spec, audio_view, options.duration_s)
        views = tuple(_renamed(window, f"window{number}") for number in range(options.clips))
        return EvalPlan(planner=Windows(views=views), modality="audio", clips=options.clips, crops=1)
    views = tuple(
        View(name=f"crop{number}", **clip_shape(spec, options), augment=augment)
        for number, augment in enumerate(_crop_specs(spec, options))
    )
    if options.spacing == "overlap":
        single = Uniform(views=views, clips=1, short=options.short)
        return EvalPlan(planner=single, modality="video", clips=1, crops=len(views), overlap=True)
    planner: Planner = Uniform(views=views, clips=options.clips, short=options.short)
    if options.spacing == "middle":
        planner = Spread(views=views, clips=options.clips, short=options.short)
    elif options.spacing == "rounded":
        planner = Rounded(views=views, clips=options.clips, short=options.short)
    elif options.spacing == "segments":
        if options.clips != 1:
            raise ValueError(f"spacing = segments makes one clip of each record, got clips = {options.clips}")
        planner = Segments(views=views, middle=True)
    return EvalPlan(planner=planner, modality="video", clips=options.clips, crops=len(views))


def clip_shape(spec: InputSpec, options: Views) -> dict[str, Any]:
    """num_frames, stride and fps of a video view."""
    stride = options.stride or (1 if options.fps else spec.stride)
    fps = options.fps or (None if options.stride else spec.fps)
    return {"num_frames": options.frames or spec.num_frames, "stride": stride, "fps": fps}


def normalize(spec: InputSpec) -> Normalize:
    """The normalisation an encoder expects."""
    if len(spec.mean) != 3 or len(spec.std) != 3:
        raise ValueError(f"a video encoder needs mean and std of 3 channels, got {spec.mean} and {spec.std}")
    return Normalize(mean=cast(Any, spec.mean), std=cast(Any, spec.std))


def resampling(options: Views) -> dict[str, Any]:
    """How pictures are resized, as arguments of `VideoSpec`."""
    return {"interpolation": "bicubic", "antialias": False} if options.centre_crop == "cut" else {}


def _crop_specs(spec: InputSpec, options: Views) -> list[VideoSpec]:
    size = options.size or spec.size
    if options.centre_crop == "cut":
        if options.crops != "centre" or options.resize is not None:
            raise ValueError("centre_crop = cut takes one crop of its own size; leave --crops and --resize out")
        return [VideoSpec(size=size, crop=CutCenter(), ops=(normalize(spec),), **resampling(options))]
    resize = options.resize or (size if options.crops == "three" else round(size / 0.875))
    if options.crops == "three" and resize != size:
        raise ValueError(f"three crops need resize = size, got {resize} and {size}; leave --resize out")
    if resize < size:
        raise ValueError(f"cannot cut {size} pixels from a short side of {resize}; use a larger --resize")
    if options.crops == "centre":
        return [VideoSpec(size=size, crop=CenterCrop(size=size, resize=resize), ops=(normalize(spec),))]
    specs = []
    for place in range(3 if options.crops == "three" else 10):
        crop = cast(Crop, PlacedCrop(size=size, resize=resize, kind=options.crops, place=place))
        mirrored = options.crops == "ten" and place % 2 == 1
        ops: tuple[Op, ...] = (Flip(p=1.0), normalize(spec)) if mirrored else (normalize(spec),)
        specs.append(VideoSpec(size=size, crop=crop, ops=ops))
    return specs


# --- sound --------------------------------------------------------------------------------------------------


def plain_audio_view(spec: InputSpec, stored: View | None = None, duration_s: float | None = None) -> View:
    """The window of sound an audio encoder is shown, without random operators.

    stored: the view it was trained on. Without one it is a `LogMel` with the bands (``spec.size``), normalisation and
    length (``spec.num_frames`` columns) that the encoder was made for.
    """
    if stored is not None:
        sound, length_s = stored.augment, stored.duration_s
        assert isinstance(sound, AudioSpec)
    else:
        mel = LogMel(mels=spec.size, mean=spec.mean[0], std=spec.std[0])
        sound = AudioSpec(hz=mel.hz, logmel=mel)
        length_s = (spec.num_frames - 1) * mel.hop / mel.hz or AUDIO_DURATION_S
    plain = AudioSpec(hz=sound.hz, logmel=sound.logmel)
    return View(name="window", modality="audio", duration_s=duration_s or length_s, augment=plain)


def _renamed(view: View, name: str) -> View:
    return View(name=name, modality="audio", duration_s=view.duration_s, augment=view.augment)
