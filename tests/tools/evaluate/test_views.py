from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipmill.models.encoder import InputSpec
from clipmill.pipeline.augment import augment, op_params
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.sound_views import audio_view_from_json, audio_view_to_json
from clipmill.pipeline.spec import AudioSpec, CutCenter, LogMel, Mask, VideoSpec
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.crops import PlacedCrop, ten_crop, three_crop
from clipmill.tools.evaluate.features import stack_views
from clipmill.tools.evaluate.views import Spread, Views, eval_views, overlapping_starts, plain_audio_view, sample_frames

SPEC = InputSpec(num_frames=3, size=32, stride=2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
lengths = st.integers(1, 40)


@given(st.integers(1, 400), lengths, st.integers(1, 8), st.integers(1, 30), st.booleans())
def test_sampled_frames_lie_in_the_video(total: int, length: int, interval: int, clips: int, twice: bool) -> None:
    frames = sample_frames(total, length, interval, clips, twice=twice)
    repeated = sample_frames(total, length, interval, clips, twice=twice, short="repeat")
    span = length * interval
    assert frames.shape == repeated.shape == (clips * (1 + (twice and total >= span)), length)
    assert 0 <= frames.min() <= frames.max() < total
    assert 0 <= repeated.min() <= repeated.max() < total
    if total >= span:
        starts = frames[:clips, 0]
        assert (np.diff(starts) >= 0).all()
        assert starts.max() <= total - span
        np.testing.assert_array_equal(frames, repeated)
        np.testing.assert_array_equal(np.diff(frames, axis=1), interval)
    else:
        assert not frames[:, 0].any()
        assert (np.diff(repeated, axis=1) >= 0).all()


@given(lengths, st.integers(1, 8), st.integers(1, 30), st.integers(0, 50))
def test_one_sampled_clip_is_the_middle_one(length: int, interval: int, clips: int, room: int) -> None:
    assert not sample_frames(length * interval, length, interval, clips)[:, 0].any()
    assert sample_frames(length * interval + room, length, interval, 1)[0, 0] == (room + 1) // 2


def test_sampling_twice_adds_the_starts_of_the_parts() -> None:
    frames = sample_frames(100, 4, 5, 4, twice=True)
    assert frames[:, 0].tolist() == [10, 30, 50, 70, 0, 20, 40, 60]


@given(st.integers(1, 400), lengths)
def test_overlapping_windows_lie_in_the_video_and_leave_no_room_for_one_more(total: int, span: int) -> None:
    starts = overlapping_starts(total, span)
    apart = max(span // 2 - 1, 1)
    assert starts[0] == 0
    assert (np.diff(starts) == apart).all()
    assert len(starts) == 1 or starts[-1] + span <= total
    assert starts[-1] + apart + span > total


def test_three_crops_of_a_square_are_one() -> None:
    assert three_crop(48, 48, 48) == [(0, 0, 48, 48)] * 3


def test_three_crops_must_have_the_short_side() -> None:
    with pytest.raises(ValueError, match="short side of 64x48, got 32"):
        three_crop(48, 64, 32)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 8))
def test_ten_crops_stay_inside(height: int, width: int, size: int) -> None:
    boxes = np.array(ten_crop(height, width, size))
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= (width, height)).all()
    np.testing.assert_array_equal(boxes[::2], boxes[1::2])


def test_placed_crops_are_the_boxes_in_source_pixels() -> None:
    heights, widths, keys = np.array([48, 60]), np.array([64, 44]), np.zeros(2, np.uint64)
    for place, (first, second) in enumerate(zip(three_crop(24, 32, 24), three_crop(33, 24, 24), strict=True)):
        box = PlacedCrop(size=24, resize=24, kind="three", place=place).boxes(keys, heights, widths).box
        np.testing.assert_allclose(box[0], [2 * first[0], 2 * first[1], 48, 48])
        scale = 44 / 24, 60 / 33  # 24 * 60 / 44 = 32.7: 33 rows
        np.testing.assert_allclose(box[1], [second[0] * scale[0], second[1] * scale[1], 24 * scale[0], 24 * scale[1]])


def test_ten_crops_come_with_their_mirror_images() -> None:
    plan = eval_views(SPEC, Views(crops="ten", frames=1, size=16, resize=24))
    rng = np.random.default_rng(0)
    payload = torch.from_numpy(rng.integers(16, 235, 48 * 64 * 3 // 2, dtype=np.uint8))
    payload[48 * 64 :] = 128
    clips = []
    for view in plan.planner.views:
        spec = view.augment
        assert isinstance(spec, VideoSpec)
        whole = replace(view, augment=replace(spec, antialias=False))
        draws = np.array([3], np.uint64)
        table = crop_table(whole, draws, np.array([[0]]), np.array([48]), np.array([64]))
        x0, y0, w, h = (int(table[name][0, 0]) for name in "xywh")
        region = payload[: 48 * 64].view(48, 64)[y0 : y0 + h, x0 : x0 + w].reshape(-1)
        region = torch.cat([region, torch.full((w * h // 2,), 128, dtype=torch.uint8)])
        params = op_params(spec, draws, 1, 0, view.key)
        clips.append(augment(region, table, whole.augment, params)[0, :, 0])  # type: ignore[arg-type]
    assert len(clips) == 10
    for plain, mirrored in zip(clips[::2], clips[1::2], strict=True):
        torch.testing.assert_close(mirrored, plain.flip(-1))
    assert len({round(float(clip.std()), 6) for clip in clips[::2]}) == 5


@pytest.mark.parametrize("spacing", ["uniform", "middle"])
def test_clips_hold_the_frames_that_were_asked_for(
    dataset: ShardIndex, frame_level: Callable[[int, int], int], spacing: str
) -> None:
    plan = eval_views(SPEC, Views(clips=4, crops="three", spacing=spacing))  # type: ignore[arg-type]
    assert plan.num_views == 12
    config = LoaderConfig(threads=1, processes=0)
    with Loader(dataset, plan.planner, batch_size=4, shuffle=False, drop_last=False, config=config) as loader:
        x = torch.cat([stack_views(batch, plan) for batch in loader.epoch()])
    assert x.shape == (6, 12, 3, 3, 32, 32)
    level = x.mean((2, 4, 5))  # (N, V, T)
    luma = (level * 0.25 + 0.5) * 219 + 16
    for record in dataset:
        frames = record.num_frames
        if spacing == "uniform":
            starts = [i * (frames - 5) // 3 for i in range(4)]
        else:
            starts = sample_frames(frames, 3, 2, 4)[:, 0].tolist()
        expected = [[frame_level(record.index, start + 2 * t) for t in range(3)] for start in starts]
        for crop in range(3):  # view = clip * 3 + crop
            np.testing.assert_allclose(luma[record.index, crop::3], expected, atol=1.0)


def test_a_video_too_short_for_twice_repeats_its_clips(dataset: ShardIndex) -> None:
    view = View(name="clip", num_frames=32, stride=2, augment=VideoSpec(size=16))
    spans = Spread(views=(view,), clips=2, twice=True)(dataset[0], Draws(0), 0).spans
    assert len(spans[0].frames) == 4 * 32
    assert spans[0].frames[:64] == spans[0].frames[64:]
    long = Spread(views=(replace(view, num_frames=4),), clips=2, twice=True)(dataset[0], Draws(0), 0).spans[0].frames
    assert [long[i] for i in range(0, 16, 4)] == [8, 24, 0, 16]


def test_a_rate_replaces_the_stride(dataset: ShardIndex) -> None:
    plan = eval_views(SPEC, Views(clips=1, fps=12.5, frames=4, spacing="middle"))
    frames = plan.planner(dataset[0], Draws(0), 0).spans[0].frames  # 25 fps: every second frame
    assert np.diff(frames).tolist() == [2, 2, 2]
    assert frames[0] == sample_frames(40, 4, 2, 1)[0, 0]


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
        eval_views(SPEC, Views(clips=0))
    with pytest.raises(ValueError, match="three crops need resize = size, got 40 and 32"):
        eval_views(SPEC, Views(crops="three", resize=40))
    with pytest.raises(ValueError, match="cannot cut 32 pixels from a short side of 24"):
        eval_views(SPEC, Views(resize=24))
    with pytest.raises(ValueError, match="3 channels"):
        eval_views(replace(SPEC, channels=1, mean=(0.0,), std=(1.0,)), Views())


def test_windows_of_sound_are_spread_over_the_record(dataset: ShardIndex) -> None:
    spec = InputSpec(modality="audio", channels=1, num_frames=41, size=24, mean=(-4.0,), std=(2.0,))
    plan = eval_views(spec, Views(clips=3))
    assert (plan.modality, plan.num_views) == ("audio", 3)
    spans = plan.planner(dataset[5], Draws(0), 0).spans  # 45 frames at 25 fps: 1.8 s
    assert [span.start_s for span in spans] == pytest.approx([0.0, 0.7, 1.4])
    assert {span.num_samples for span in spans} == {6400}
    one = eval_views(spec, Views(clips=1)).planner(dataset[5], Draws(0), 0).spans
    assert one[0].start_s == pytest.approx(0.7)
    mel = plan.planner.views[0].augment.logmel  # type: ignore[union-attr]
    assert mel == LogMel(mels=24, mean=-4.0, std=2.0)
    with Loader(dataset, plan.planner, batch_size=6, shuffle=False, config=LoaderConfig(processes=0)) as loader:
        x = stack_views(next(loader.epoch()), plan)
    assert x.shape == (6, 3, 1, 24, 41)


def test_a_stored_view_of_sound_wins_without_its_noise() -> None:
    mel = LogMel(hz=8000, mels=12, hop=80, n_fft=256, win=200, floor=1e-3)
    trained = View(
        name="sound", modality="audio", duration_s=0.5, augment=AudioSpec(hz=8000, logmel=mel, ops=(Mask(axis="time"),))
    )
    stored = audio_view_from_json(audio_view_to_json(trained))
    spec = InputSpec(modality="audio", channels=1, size=80, mean=(0.0,), std=(1.0,))
    for source in (trained, stored):
        view = plain_audio_view(spec, source)
        assert view.augment == AudioSpec(hz=8000, logmel=mel)
        assert view.duration_s == 0.5
        assert plain_audio_view(spec, source, 0.75).duration_s == 0.75
    with pytest.raises(ValueError, match="not an audio view"):
        audio_view_to_json(View(name="clip"))


def test_the_centre_can_be_cut_before_it_is_resized() -> None:
    plan = eval_views(SPEC, Views(clips=1, centre_crop="cut"))
    (view,) = plan.planner.views
    assert isinstance(view.augment, VideoSpec)
    assert view.augment.crop == CutCenter()
    assert (view.augment.size, view.augment.interpolation, view.augment.antialias) == (32, "bicubic", False)
    for options in (Views(centre_crop="cut", resize=40), Views(centre_crop="cut", crops="three")):
        with pytest.raises(ValueError, match="leave --crops and --resize out"):
            eval_views(SPEC, options)
