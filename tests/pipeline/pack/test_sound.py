"""Sound on the picture's clock: a click lands where it belongs, gaps are zero and noted, rates and channels agree."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from clipmill.pipeline.pack.audio import Heard, find_runs, to_mono, wav_header

AT = [0.2, 0.9, 1.7, 2.6, 3.5]
B_FRAMES = {"preset": "ultrafast", "crf": "10", "g": "25", "bf": "2"}


def film(kit, name, codec="aac", hz=48000, channels=1, at=AT, **facts):
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    wave = kit.clicks(4.0, at, hz, channels)
    return kit.film(name, sound=wave, sound_hz=hz, sound_codec=codec, sound_layout=layout, **facts)


def assert_clicks(kit, result, expected, samples=1.0):
    """Clicks lie at the expected times, to within this many samples of the packed rate."""
    assert result.status == "ok", (result.reason, result.detail)
    times = kit.click_times(result.sound, len(expected))
    assert np.abs(np.array(times) - expected).max() * result.sound.audio_hz <= samples
    return result


def shift(seconds):
    def change(packet):
        ticks = round(Fraction(seconds) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packet

    return change


@pytest.mark.parametrize(
    ("name", "codec", "hz", "channels"),
    [
        ("a.mkv", "pcm_s16le", 8000, 1),
        ("a.mkv", "pcm_s16le", 16000, 2),
        ("a.mkv", "pcm_s24le", 48000, 6),
        ("a.mov", "pcm_f32le", 96000, 2),
        ("a.mov", "pcm_u8", 44100, 1),
        ("a.mkv", "flac", 44100, 2),
        ("a.mp4", "aac", 48000, 2),
        ("a.mp4", "aac", 44100, 1),
        ("a.mp4", "aac", 8000, 1),
        ("a.mp4", "aac", 48000, 6),
        ("a.ts", "aac", 48000, 2),
        ("a.flv", "aac", 44100, 1),
        ("a.mp4", "libmp3lame", 44100, 2),
        ("a.mkv", "libmp3lame", 8000, 1),
        ("a.mp4", "libopus", 48000, 2),
        ("a.mkv", "libopus", 48000, 2),
        ("a.mkv", "ac3", 48000, 6),
        ("a.ts", "mp2", 44100, 1),
        ("a.avi", "pcm_s16le", 16000, 1),
    ],
)
def test_clicks_stay_where_they_are(kit, name, codec, hz, channels):
    """Priming of the codec is removed, the rate converted, channels mixed down; all at once."""
    result = assert_clicks(kit, kit.pack(film(kit, name, codec, hz, channels)), AT, 0.25)
    assert result.sound.num_samples == 64000
    assert result.sound.audio_hz == 16000
    assert result.facts["sound"]["gaps"] == []
    assert not result.sound.silent
    assert 0.5 < np.abs(kit.heard(result.sound)).max() / 32768 <= 1  # as loud as before, whatever the channels


@pytest.mark.parametrize("audio_hz", [8000, 22050, 44100, 48000])
def test_other_packed_rates(kit, audio_hz):
    result = assert_clicks(kit, kit.pack(film(kit, "a.mp4"), audio_hz=audio_hz), AT)
    assert result.sound.num_samples == 4 * audio_hz


def test_sound_can_be_left_out(kit):
    assert kit.pack(film(kit, "a.mp4"), audio_hz=0).sound is None


@pytest.mark.parametrize(
    ("name", "codec", "tick_s"), [("a.mkv", "pcm_s16le", 0), ("a.ts", "aac", 0), ("a.mp4", "aac", 1e-3)]
)
def test_sound_that_starts_late(kit, name, codec, tick_s):
    """MP4 notes a late start in milliseconds only."""
    result = kit.pack(film(kit, name, codec, sound_at_s=1.5))
    assert_clicks(kit, result, [t + 1.5 for t in AT[:3]], 1 + tick_s * 16000)
    assert result.sound.num_samples == 64000
    first, length = result.facts["sound"]["gaps"][0]
    assert first == 0
    assert length == pytest.approx(1.5, abs=0.03)
    assert (kit.heard(result.sound)[: int(1.4 * 16000)] == 0).all()


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_picture_that_starts_late_cuts_the_sound_before_it(kit, name):
    path = film(kit, name, frames=60, times=[n + 37 for n in range(60)])
    result = assert_clicks(kit, kit.pack(path), [t - 37 / 25 for t in AT[2:]])
    assert result.sound.num_samples == 60 * 640


@pytest.mark.parametrize("seconds", ["2.5", "95442", "-0.5"])
@pytest.mark.parametrize("name", ["b.mkv", "b.ts"])
def test_sound_and_picture_move_together(kit, seconds, name):
    if seconds == "-0.5" and name == "b.ts":
        pytest.skip("a transport stream has no negative times")
    source = film(kit, "a.mp4", options=B_FRAMES)
    path = kit.remux(source, kit.folder / name, shift(seconds), avoid_negative_ts="disabled")
    result = assert_clicks(kit, kit.pack(path), AT)
    assert kit.shown(result.picture) == list(range(100))


def test_joined_broadcasts_keep_sound_and_picture_together(kit):
    part = film(kit, "a.ts", options=B_FRAMES).read_bytes()
    (kit.folder / "joined.ts").write_bytes(part + part)
    result = kit.pack(kit.folder / "joined.ts")
    shown = kit.shown(result.picture)
    again = len(shown) - 100
    assert shown[:100] == shown[again:] == list(range(100))
    assert again - 100 <= 1  # the part's sound is a little longer than its picture
    times = kit.click_times(result.sound, 10)
    assert times[:5] == pytest.approx(AT, abs=1 / 16000)
    assert times[5:] == pytest.approx([t + again / 25 for t in AT], abs=1 / 25)
    assert np.diff(times[5:]) == pytest.approx(np.diff(AT), abs=1 / 16000)


def test_short_sound_is_filled_and_long_sound_is_cut(kit):
    wave = kit.clicks(2.0, AT[:3], 48000)
    short = kit.pack(kit.film("s.mp4", sound=wave, sound_hz=48000, sound_codec="aac"))
    assert_clicks(kit, short, AT[:3])
    assert short.sound.num_samples == 64000
    assert short.facts["sound"]["gaps"] == [pytest.approx([2.0, 2.0], abs=0.03)]
    long = kit.pack(film(kit, "l.mp4", frames=50))
    assert_clicks(kit, long, AT[:3])
    assert long.sound.num_samples == 32000


@pytest.mark.parametrize("name", ["g.mkv", "g.ts", "g.mp4"])
def test_gaps_are_zero_and_noted(kit, name):
    def drop(packet):
        lost = packet.stream.type == "audio" and 1.1 <= packet.pts * packet.time_base < 1.5
        return None if lost else packet

    result = kit.pack(kit.remux(film(kit, f"a{name}"), kit.folder / name, drop))
    assert_clicks(kit, result, AT)
    ((first, length),) = result.facts["sound"]["gaps"]
    assert first == pytest.approx(1.1, abs=0.03)
    assert length == pytest.approx(0.4, abs=0.03)
    inside = kit.heard(result.sound)[round((first + 0.01) * 16000) : round((first + length - 0.01) * 16000)]
    assert (inside == 0).all()


def test_a_drifting_clock_is_followed(kit):
    """Timestamps say that the recorder's 48000 Hz were 0.2 % fewer."""

    def stretch(packet):
        if packet.stream.type == "audio":
            packet.pts = packet.dts = round(packet.pts * 1.002)
        return packet

    result = kit.pack(kit.remux(film(kit, "a.mp4"), kit.folder / "d.mp4", stretch))
    assert_clicks(kit, result, [t * 1.002 for t in AT])
    assert result.facts["sound"]["drift_ppm"] == pytest.approx(2000, rel=0.05)


def test_digital_silence_is_flagged_and_quiet_sound_is_not(kit):
    silent = kit.pack(kit.film("s.mp4", sound=np.zeros((2, 64000)), sound_codec="aac", sound_layout="stereo"))
    assert silent.sound.silent
    assert silent.sound.num_samples == 64000
    quiet = 0.001 * np.sin(np.arange(64000) / 10)[None]
    assert not kit.pack(kit.film("q.mkv", sound=quiet)).sound.silent


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.wav", "pcm_s16le"), ("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.m4a", "aac"), ("a.opus", "libopus")],
)
def test_sound_without_picture(kit, name, codec):
    path = film(kit, name, codec, frames=0)
    result = assert_clicks(kit, kit.pack(path), AT)
    assert result.picture is None
    assert result.sound.num_samples == pytest.approx(64000, abs=1100)
    part = kit.pack(path, 1.0, 3.0)
    assert part.sound.num_samples == 32000
    assert_clicks(kit, part, [t - 1 for t in AT[2:4]])


def test_the_sound_of_a_part(kit):
    result = kit.pack(film(kit, "a.mp4", options=B_FRAMES), 0.8, 3.2)
    assert_clicks(kit, result, [t - 0.8 for t in AT[1:4]])
    assert result.sound.num_samples == round(2.4 * 16000)
    assert kit.shown(result.picture) == list(range(20, 80))


def test_sound_that_does_not_decode_is_left_out(kit):
    rng = np.random.default_rng(0)

    def spoil(packet):
        if packet.stream.type == "video":
            return packet
        other = av.Packet(rng.integers(0, 256, packet.size, np.uint8).tobytes())
        other.pts, other.dts, other.time_base, other.duration = (
            packet.pts,
            packet.dts,
            packet.time_base,
            packet.duration,
        )
        return other

    result = kit.pack(kit.remux(film(kit, "a.mp4"), kit.folder / "b.mp4", spoil))
    assert (result.status, result.reason) == ("salvaged", "sound_damaged")
    assert result.sound is None
    assert kit.shown(result.picture) == list(range(100))


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("mono", [1]),
        ("stereo", [1, 1]),
        ("5.1", [1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5]),
        ("5.1(side)", [1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5]),
        ("2.1", [1, 1, 0]),
        ("7.1", [1, 1, 2**0.5, 0] + [0.5**0.5] * 4),
    ],
)
@pytest.mark.parametrize("kind", ["fltp", "flt", "s16", "s16p", "s32p", "u8", "dblp"])
def test_the_mix_down_is_a_fixed_weighted_mean(layout, weights, kind):
    rng = np.random.default_rng(0)
    channels = rng.uniform(-0.9, 0.9, (len(weights), 64)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(channels.T.reshape(1, -1), "flt", layout)
    frame.sample_rate = 8000
    (frame,) = av.AudioResampler(kind, layout, 8000).resample(frame)
    expected = np.array(weights) @ channels / np.sum(weights)
    assert to_mono(frame) == pytest.approx(expected, abs=0.02 if kind == "u8" else 2e-4)


def test_stretches_without_a_time_come_before_the_first_with_one():
    runs = find_runs(
        [Heard(None, 100, 0, 10), Heard(None, 100, 10, 10), Heard(0.3, 100, 20, 10), Heard(None, 100, 30, 5)]
    )
    assert len(runs) == 1
    assert runs[0].start_s == pytest.approx(0.1)
    assert runs[0].count == 35


@pytest.mark.parametrize("step_s", [0.0, -0.001, 0.001])
def test_timestamps_that_hardly_move_are_no_sampling_rate(step_s):
    (run,) = find_runs([Heard(n * step_s, 1000, 10 * n, 10) for n in range(10)])
    assert (run.hz, run.first, run.count) == (1000.0, 0, 100)


def test_rounded_timestamps_are_fitted_and_a_change_of_rate_starts_a_new_run():
    heard = [Heard(round(n * 1024 / 44.1 + 3.2) / 1000, 44100, n * 1024, 1024) for n in range(100)]
    end = heard[-1]
    runs = find_runs([*heard, Heard(end.time_s + 1024 / 44100, 22050, 102400, 1024)])
    assert [run.hz for run in runs] == [44100, 22050]
    assert runs[0].start_s == pytest.approx(0.0032, abs=2e-4)


def test_the_written_file_is_a_plain_wav(kit):
    result = kit.pack(film(kit, "a.mp4"))
    with wave.open(result.sound.path) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        assert file.getnframes() == 64000
    assert len(wav_header(5, 8000)) == 44
