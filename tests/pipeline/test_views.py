from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.pipeline.draws import Draws
from clipmill.pipeline.spec import AudioSpec, VideoSpec
from clipmill.pipeline.views import Clips, LongShort, Segments, Sound, Span, Uniform, View, clip_span


def record(num_frames=100, fps=25, num_samples=64000):
    return SimpleNamespace(
        num_frames=num_frames,
        fps=Fraction(fps),
        num_samples=num_samples,
        audio_hz=16000,
        duration_s=num_frames / fps,
    )


def draw(planner, rec, key=0):
    return planner(rec, Draws(key), key).spans


@given(st.integers(1, 300), st.integers(1, 32), st.integers(1, 8), st.integers(0, 999))
def test_clips_stay_inside_and_keep_their_stride(num_frames, length, stride, key):
    view = View(name="a", num_frames=length, stride=stride)
    (span,) = draw(Clips(views=(view,)), record(num_frames), key)
    assert len(span.frames) == length
    assert all(0 <= frame < num_frames for frame in span.frames)
    if num_frames >= view.extent(record(num_frames)):
        assert np.all(np.diff(span.frames) == stride)
    else:
        assert np.all(np.diff(span.frames) % num_frames == stride % num_frames)


def test_every_start_is_equally_likely():
    view = View(name="a", num_frames=4, stride=2)
    starts = [draw(Clips(views=(view,)), record(10), key)[0].frames[0] for key in range(4000)]
    counts = np.bincount(starts)
    assert len(counts) == 4
    assert counts.min() > 850


def test_fps_picks_the_frame_shown_at_each_instant():
    view = View(name="a", num_frames=8, fps=16)
    span = clip_span(view, record(fps=30), 10)
    assert span.frames == tuple(10 + int(k * 30 / 16 + 1e-6) for k in range(8))
    assert clip_span(View(name="a", num_frames=4, fps=50), record(fps=25), 0).frames == (0, 0, 1, 1)
    assert span.start_s == pytest.approx(10 / 30)


@pytest.mark.parametrize(("short", "frames"), [("loop", (0, 1, 2, 0, 1)), ("repeat", (0, 1, 2, 2, 2))])
def test_short_videos(short, frames):
    planner = Clips(views=(View(name="a", num_frames=5),), short=short)
    assert draw(planner, record(3))[0].frames == frames


def test_skip_leaves_out_short_and_silent_records(dataset):
    planner = Clips(views=(View(name="a", num_frames=43),), short="skip")
    assert planner.usable(dataset).tolist() == [False, False, False, True, True, True]
    by_time = Clips(views=(View(name="a", num_frames=22, fps=12.5),), short="skip")
    assert by_time.usable(dataset).tolist() == [False, False, False, True, True, True]
    sound = View(name="s", modality="audio", duration_s=1, augment=AudioSpec())
    assert Clips(views=(View(name="a"), sound)).usable(dataset).all()


def test_silent_records_cannot_serve_sound(make_dataset, tmp_path):
    index = make_dataset(tmp_path, num_records=2, num_frames=4, audio=False)
    sound = View(name="s", modality="audio", duration_s=1, augment=AudioSpec())
    assert not Clips(views=(View(name="a"), sound)).usable(index).any()
    assert not Sound(views=(sound,)).usable(index).any()


def test_shared_clips_are_equal_and_independent_ones_differ():
    views = (View(name="q", num_frames=4), View(name="k", num_frames=4))
    shared = draw(Clips(views=views), record(), 3)
    assert shared[0].frames == shared[1].frames
    apart = [draw(Clips(views=views, shared=False), record(), key) for key in range(50)]
    assert sum(a.frames == b.frames for a, b in apart) < 10


def test_sound_starts_with_the_clip():
    sound = View(name="s", modality="audio", duration_s=0.5, augment=AudioSpec())
    video, audio = draw(Clips(views=(View(name="v", num_frames=4), sound)), record(), 5)
    assert audio.start_sample == round(video.frames[0] / 25 * 16000)
    assert audio.num_samples == 8000
    starts = {draw(Clips(views=(View(name="v"), sound), audio_jitter_s=0.1), record(), k)[1].start_s for k in range(9)}
    assert len(starts) == 9


@given(st.integers(1, 200), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_segments_take_one_frame_each(num_frames, count, distinct, key):
    views = (View(name="q", num_frames=count), View(name="k", num_frames=count))
    query, other = draw(Segments(views=views, distinct=distinct), record(num_frames), key)
    for span in (query, other):
        assert len(span.frames) == count
        for segment, frame in enumerate(span.frames):
            low, high = segment * num_frames // count, (segment + 1) * num_frames // count
            assert low <= frame < max(high, low + 1) or frame == num_frames - 1
    if distinct and num_frames >= 2 * count:
        assert not set(query.frames) & set(other.frames)


def test_long_short_views_tile_the_long_clip():
    long = View(name="long", num_frames=8, stride=2)
    views = (long, View(name="long_k", num_frames=8, stride=2), *(View(name=f"s{i}", num_frames=4) for i in range(2)))
    spans = draw(LongShort(views=views, num_long=2), record(), 1)
    assert spans[0].frames == spans[1].frames == spans[2].frames + spans[3].frames
    assert spans[3].start_s == spans[3].frames[0] / 25


def test_short_views_may_overlap_or_go_slower(dataset):
    long = View(name="long", num_frames=10, stride=4)
    slow = View(name="s0", num_frames=3, stride=2)
    planner = LongShort(views=(long, slow, View(name="s1", num_frames=4, stride=4)), starts=(2, 6))
    whole, first, second = (span.frames for span in draw(planner, record(), 5))
    assert first == (whole[2], whole[2] + 2, whole[3])
    assert second == whole[6:]
    assert planner.usable(dataset).all()
    looped = [span.frames for span in draw(planner, record(7), 5)]
    assert looped == [tuple(4 * k % 7 for k in range(10)), (1, 3, 5), tuple(4 * k % 7 for k in range(6, 10))]
    beyond = LongShort(views=planner.views, starts=(2, 7))
    with pytest.raises(ValueError, match="the short views cover 11 frames, the long view has 10"):
        beyond.usable(dataset)
    with pytest.raises(ValueError, match="2 short views need as many starts"):
        LongShort(views=planner.views, starts=(0,)).usable(dataset)


def test_uniform_clips_cover_the_video():
    view = View(name="a", num_frames=4)
    (span,) = draw(Uniform(views=(view,), clips=3), record(24))
    assert span.frames == (0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23)
    (middle,) = draw(Uniform(views=(view,)), record(24))
    assert middle.frames == (10, 11, 12, 13)


def test_views_refuse_nonsense():
    with pytest.raises(ValueError, match="does not fit AudioSpec"):
        View(name="a", augment=AudioSpec())
    with pytest.raises(ValueError, match="duration_s > 0, got 0"):
        View(name="a", modality="audio", augment=AudioSpec())
    with pytest.raises(ValueError, match="must be positive"):
        View(name="a", num_frames=0)
    with pytest.raises(ValueError, match="must be positive"):
        View(name="a", fps=0.0)
    assert isinstance(View(name="a").augment, VideoSpec)
    assert Span(view="a").frames == ()
