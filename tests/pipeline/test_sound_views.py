"""Two moments of a video in both streams, policies for silence, sound views as JSON, augmentation of spectrograms."""

import shutil
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from clipmill.pipeline import audio
from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.draws import Draws, fold
from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.sound_spec import AudioSpec, LogMel, MelCrop, TimeWarp
from clipmill.pipeline.sound_views import TwoMoments, timed_frames
from clipmill.pipeline.spec import VideoSpec
from clipmill.pipeline.views import Clips, Sound, View, is_silent, sound_mask


def record(num_frames=250, fps=25, sound_s=10.0, crcs=()):
    return SimpleNamespace(
        num_frames=num_frames,
        fps=Fraction(fps),
        num_samples=round(sound_s * 16000),
        audio_hz=16000 if sound_s else 0,
        audio_crcs=np.array(crcs, np.uint32),
        duration_s=num_frames / fps,
    )


def planner(**options):
    clip = View(name="v1", num_frames=8, fps=16.0)
    sound = View(name="a1", modality="audio", duration_s=2.0, augment=AudioSpec())
    pairs = (clip, replace(clip, name="v2")), (sound, replace(sound, name="a2"))
    return TwoMoments(video=pairs[0], audio=pairs[1], **options)


def draw(plan, rec, key=0):
    return plan(rec, Draws(key), key).spans


@settings(deadline=None)
@given(st.integers(0, 9999), st.sampled_from([24, 25, 30]), st.integers(100, 400))
def test_pictures_lie_inside_the_sound_and_views_share_their_middle(key, fps, num_frames):
    rec = record(num_frames, fps, num_frames / fps)
    v1, v2, a1, a2 = draw(planner(), rec, key)
    assert v1.frames[4:] == v2.frames[:4]
    assert a2.start_sample - a1.start_sample == 16000
    begin_s, end_s = a1.start_s, a1.start_s + 3.0
    assert begin_s >= 0
    assert end_s <= rec.duration_s + 1e-4
    assert begin_s - 1e-4 <= v1.start_s <= end_s - 0.75 + 1e-4
    assert v2.start_s == pytest.approx(v1.start_s + 0.25)
    assert all(0 <= frame < num_frames for frame in (*v1.frames, *v2.frames))
    assert list(v1.frames) == [int((v1.start_s + k / 16) * fps) for k in range(8)]


def test_the_offset_of_the_pictures_is_uniform():
    offsets = []
    for key in range(3000):
        v1, _, a1, _ = draw(planner(), record(2500, 25, 100.0), key)
        offsets.append(v1.start_s - a1.start_s)
    offsets = np.array(offsets)
    assert offsets.min() >= -1e-4
    assert offsets.max() <= 2.25 + 1e-4
    assert np.mean(offsets <= 1.5) == pytest.approx(2 / 3, abs=0.03)  # the clip lies fully inside its own sound
    assert np.mean(offsets >= 2.0) == pytest.approx(1 / 9, abs=0.03)  # they do not overlap at all


@pytest.mark.parametrize(("times", "video_gap_s", "audio_gap_s"), [("same", 0, 0), ("adjacent", 0.5, 2.0)])
def test_other_windows(times, video_gap_s, audio_gap_s):
    v1, v2, a1, a2 = draw(planner(times=times), record(), 3)
    assert v2.start_s - v1.start_s == pytest.approx(video_gap_s)
    assert a2.start_s - a1.start_s == pytest.approx(audio_gap_s, abs=1e-4)
    if times == "same":
        assert v1.frames == v2.frames


def test_far_moments_are_half_a_video_apart():
    rec = record()
    v1, v2, a1, a2 = draw(planner(times="far_apart"), rec, 1)
    assert v2.start_s - v1.start_s == pytest.approx(5.0)
    assert (a1.start_s, a2.start_s) == pytest.approx((v1.start_s, v2.start_s), abs=1e-4)
    sides = set()
    for key in range(20):
        v1, v2, a1, a2 = draw(planner(times="far_video"), rec, key)
        assert v2.start_s - v1.start_s == pytest.approx(5.0)
        assert a1.start_sample == a2.start_sample
        sides.add(abs(a1.start_s - v1.start_s) < 1e-3)
    assert sides == {True, False}
    v1, v2, a1, a2 = draw(planner(times="far_audio"), rec, 1)
    assert v1.frames == v2.frames
    assert a2.start_s - a1.start_s == pytest.approx(5.0, abs=1e-4)
    starts = [draw(planner(times="random"), rec, key) for key in range(5)]
    assert len({round(spans[1].start_s - spans[0].start_s, 3) for spans in starts}) > 1


@pytest.mark.parametrize(("num_frames", "sound_s"), [(5, 10.0), (250, 1.0), (3, 0.5)])
def test_streams_shorter_than_their_window(num_frames, sound_s):
    for key in range(10):
        v1, v2, a1, a2 = draw(planner(), record(num_frames, 25, sound_s), key)
        assert len(v1.frames) == len(v2.frames) == 8
        assert a1.num_samples == a2.num_samples == 32000
        assert max(v2.frames) < num_frames
        if sound_s < 3:
            assert a1.start_sample == 0
        if num_frames < 12:
            assert v1.frames[0] == 0


def test_frames_stop_half_a_frame_before_the_end_of_the_window():
    assert timed_frames(8, 80, 16, 0.0, 0.75).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert len(timed_frames(25, 10, 16, 1.0, 0.75)) == 0


# --- silence ------------------------------------------------------------------------------------------------


def crc(pcm):
    return zlib.crc32(np.asarray(pcm, "<i2").tobytes())


def half_silent():
    """A second and a bit of noise, the rest zeros."""
    zeros, noise = np.zeros(AUDIO_BLOCK, np.int16), np.ones(AUDIO_BLOCK, np.int16)
    blocks = [noise, *[zeros] * 8, np.zeros(12000, np.int16)]
    rec = record(250, 25, 0.0, [crc(block) for block in blocks])
    rec.num_samples, rec.audio_hz = sum(map(len, blocks)), 16000
    return rec


def test_silence_is_read_from_checksums():
    rec = half_silent()

    def span(start, count=16000):
        return SimpleNamespace(start_sample=start, num_samples=count)

    assert not is_silent(rec, span(0))
    assert not is_silent(rec, span(AUDIO_BLOCK - 1))
    assert is_silent(rec, span(AUDIO_BLOCK))
    assert is_silent(rec, span(9 * AUDIO_BLOCK))
    assert is_silent(rec, span(rec.num_samples + 5))
    assert is_silent(rec, span(-20000, 16000))


def test_silent_windows_are_drawn_again():
    rec = half_silent()
    view = View(name="a", modality="audio", duration_s=1.0, augment=AudioSpec())
    share = {}
    for silence in ("keep", "redraw"):
        spans = [draw(Sound(views=(view,), silence=silence), rec, key)[0] for key in range(200)]
        share[silence] = np.mean([is_silent(rec, span) for span in spans])
    assert share["keep"] > 0.7
    assert share["redraw"] < share["keep"] ** 5
    clip = View(name="v", num_frames=4)
    both = Clips(views=(clip, view), silence="redraw")
    assert np.mean([is_silent(rec, draw(both, rec, key)[1]) for key in range(200)]) < 0.5
    plain = Clips(views=(clip, view))
    assert draw(plain, rec, 5) == draw(Clips(views=(clip, view), silence="keep"), rec, 5)


@pytest.fixture
def mixed(make_dataset, tmp_path):
    """Four records: sound, silence throughout, no sound, sound."""
    index = make_dataset(tmp_path / "plain", num_records=4)
    (tmp_path / "mixed").mkdir()
    shard = shutil.copy(index.shards[0], tmp_path / "mixed")
    records = []
    for number in range(4):
        one = replace(index[number], shard=Path(shard).name)
        if number == 1:
            one = replace(one, silent=True)
        if number == 2:
            one = replace(one, num_samples=0, audio_hz=0, audio_crcs=np.empty(0, np.uint32))
        records.append(one)
    write_index(tmp_path / "mixed" / "index.arrow", records, [Path(shard).name], index.classes)
    return ShardIndex.open(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("silence", "rows"), [("keep", [0, 1, 3]), ("skip", [0, 3]), ("redraw", [0, 3]), ("zero", [0, 1, 2, 3])]
)
def test_policies_choose_records(mixed, silence, rows):
    clip = View(name="v", num_frames=4, augment=VideoSpec(size=16))
    sound = View(name="a", modality="audio", duration_s=0.5, augment=AudioSpec())
    plan = Clips(views=(clip, sound), silence=silence)
    assert np.flatnonzero(plan.usable(mixed)).tolist() == rows
    loader = Loader(mixed, plan, batch_size=2, shuffle=False, config=LoaderConfig(threads=1, processes=0))
    assert loader.skipped == 4 - len(rows)
    with loader:
        waves = torch.cat([batch.audio["a"] for batch in loader.epoch()])
    if silence == "zero":
        assert waves.shape == (4, 8000)
        assert (waves[2] == 0).all()
        assert waves[0].abs().max() > 0
    two = planner(silence=silence)
    assert np.flatnonzero(two.usable(mixed)).tolist() == rows


def test_zeros_need_one_rate(mixed):
    view = View(name="a", modality="audio", duration_s=0.5, augment=AudioSpec(hz=8000))
    with pytest.raises(ValueError, match="packed at \\[16000\\] Hz, view 'a' wants 8000 Hz"):
        sound_mask(mixed, "zero", [view])


# --- augmentation of spectrograms -----------------------------------------------------------------------------


def test_a_crop_of_the_canvas_equals_bicubic_interpolation():
    mel = torch.randn(3, 20, 31, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[0, 0, 20, 46], [3, 9, 12, 30], [19, 45, 1, 1]])
    out = audio.crop_canvas(mel, (1.0, 1.5), boxes)
    left = (46 - 31) // 2
    canvas = F.pad(mel, (left, 46 - 31 - left))
    for one, whole, (i, j, h, w) in zip(out, canvas, boxes.tolist(), strict=True):
        part = whole[None, None, i : i + h, j : j + w]
        expected = F.interpolate(part, (20, 31), mode="bicubic", align_corners=True)[0, 0]
        assert torch.allclose(one, expected, atol=1e-4)


def test_boxes_stay_on_the_canvas():
    keys = np.array([fold(i) for i in range(500)], np.uint64)
    op = MelCrop()
    mel = torch.zeros(500, 80, 201)
    i, j, h, w = audio.crop_boxes(mel, op, op.draw(keys)).T
    assert (i >= 0).all()
    assert (j >= 0).all()
    assert (i + h <= 80).all()
    assert (j + w <= 301).all()
    assert (h.min(), h.max()) == (48, 80)
    assert w.min() >= 120
    assert w.max() <= 301
    same = audio.crop_canvas(mel[:1] + 1.0, (1.0, 1.5), np.array([[0, 50, 80, 201]]))
    assert torch.allclose(same, torch.ones(1, 80, 201), atol=1e-5)


def test_time_warp_moves_one_instant_and_keeps_the_order():
    mel = torch.arange(100.0).expand(4, 8, 100).contiguous()
    op = TimeWarp(window=20)
    drawn = op.draw(np.array([fold(i) for i in range(4)], np.uint64))
    out = audio.time_warp(mel, op, drawn)
    assert out.shape == mel.shape
    assert out.min() > -2
    assert out.max() < 101
    assert (out[..., 1:] >= out[..., :-1] - 1).all()  # the order of instants stays
    assert not torch.allclose(out, mel)
    assert not torch.allclose(out[0], out[1])
    assert torch.equal(audio.time_warp(mel[..., :30], op, drawn), mel[..., :30])


def test_a_view_runs_all_operators():
    ops = (TimeWarp(window=5), MelCrop())
    view = View(name="a", modality="audio", duration_s=0.5, augment=AudioSpec(logmel=LogMel(mels=40), ops=ops))
    pcm = torch.from_numpy(np.random.default_rng(0).integers(-9000, 9000, (2, 8000)).astype(np.int16))
    keys = np.array([fold(1), fold(2)], np.uint64)
    one, two = (audio.waveform_to_view(pcm, 16000, view, keys) for _ in range(2))
    assert one.shape == (2, 1, 40, 51)
    assert torch.equal(one, two)
    alone = audio.waveform_to_view(pcm[1:], 16000, view, keys[1:])
    assert torch.allclose(alone, one[1:], atol=1e-5)
