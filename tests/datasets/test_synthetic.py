"""Scenes: pictures, masks, boxes and sound agree; the class can be learnt from motion or sound, not from a frame."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clipmill.datasets.synthetic import SHAPES, Body, Rhythm, Scene, Surface, box_of
from clipmill.datasets.synthetic_draw import MOTIONS, RHYTHMS, class_names, draw_clip, draw_image, draw_sequence

CLOTH = Surface(family="checks", waves=(2, 3), seed=1, colours=((40, 0, 0), (200, 90, 90)))
GROUND = Surface(family="clouds", waves=(3, 3), seed=2, colours=((90, 110, 90), (130, 150, 160)))


def scene(*bodies: Body, **fields: object) -> Scene:
    base = Scene(height=96, width=128, fps=Fraction(24), num_frames=48, background=GROUND, bodies=bodies)
    return replace(base, **fields)


def test_same_scene_same_frame_and_sound() -> None:
    one, two = draw_clip(0, 5, 1, 1), draw_clip(0, 5, 1, 1)
    assert one == two
    assert np.array_equal(one.frame(7), two.frame(7))
    assert np.array_equal(one.sound(16000), two.sound(16000))
    assert one.frame(0).shape == (one.height, one.width, 3)
    assert one.frame(0).dtype == np.uint8
    assert not np.array_equal(one.frame(0), draw_clip(1, 5, 1, 1).frame(0))
    with pytest.raises(ValueError, match="frame 99999"):
        one.frame(99999)


def test_class_decides_nothing_but_motion_and_rhythm() -> None:
    for number in range(20):
        first = draw_clip(0, number, 0, 0)
        for motion in range(len(MOTIONS)):
            for rhythm in range(len(RHYTHMS)):
                other = draw_clip(0, number, motion, rhythm)
                (a,), (b,) = first.bodies, other.bodies
                assert replace(other, bodies=(), rhythm=first.rhythm) == replace(first, bodies=())
                assert replace(b, phase=a.phase, turns_hz=a.turns_hz) == a
                assert [hz != 0 for hz in b.turns_hz] == [bool(speed) for speed in list(MOTIONS.values())[motion]]


def test_level_of_every_rhythm_is_uniform() -> None:
    time_s = np.arange(100_000) / 997.0
    for rate_hz, loud_first, split in RHYTHMS.values():
        rhythm = Rhythm(rate_hz=rate_hz, phase=0.3, loud_first=loud_first, split=split)
        deciles = np.histogram(rhythm.level(time_s), 10, (0, 1))[0] / len(time_s)
        assert np.allclose(deciles, 0.1, atol=0.005)


def test_events_are_where_the_level_jumps() -> None:
    time_s = np.arange(0, 3, 1e-4)
    for rate_hz, loud_first, split in RHYTHMS.values():
        rhythm = Rhythm(rate_hz=rate_hz, phase=0.3, loud_first=loud_first, split=split)
        jumps = np.diff(rhythm.level(time_s)) * (1 if loud_first else -1) > 0.5
        assert np.allclose(time_s[1:][jumps], rhythm.events_s(3.0), atol=2e-4)
        assert len(rhythm.events_s(3.0)) == pytest.approx(3 * rate_hz, abs=1.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_follows_a_moving_object(shape: str) -> None:
    body = Body(shape=shape, surface=CLOTH, radius=0.2, centre=(0.4, 0.5, 0, 0.3), velocity=(0.25, 0.0))
    whole = scene(body)
    start = whole.label_map(0) == 1
    for t in (4, 8, 16):  # 0.25 short sides per second are one pixel per frame
        moved = whole.label_map(t) == 1
        assert np.array_equal(moved[:, t:], start[:, :-t])
        x, y, width, height = whole.box(0) or (0, 0, 0, 0)
        assert whole.box(t) == (x + t, y, width, height)
    clean = scene(body, background=replace(GROUND, colours=((0, 0, 0), (0, 0, 0)))).frame(0)
    assert (clean.any(2) >= start).all()  # the object is painted where the mask says, but for the soft edge
    assert (clean.any(2) & ~start).sum() < 0.25 * start.sum()


def test_disc_has_the_area_of_a_disc() -> None:
    body = Body(shape="disc", surface=CLOTH, radius=0.25, centre=(0.66, 0.5, 0, 0))
    area = (scene(body).label_map(0) == 1).sum()
    assert area == pytest.approx(np.pi * 24**2, rel=0.01)
    grown = replace(body, centre=(0.66, 0.5, 0.5, 0))
    assert (scene(grown).label_map(0) == 1).sum() == pytest.approx(2 * area, rel=0.02)


def test_front_object_covers_the_other() -> None:
    back = Body(shape="square", surface=CLOTH, radius=0.3, centre=(0.6, 0.5, 0, 0))
    front = Body(shape="disc", surface=CLOTH, radius=0.15, centre=(0.6, 0.5, 0, 0))
    both, alone = scene(back, front), scene(front)
    labels = both.label_map(0)
    assert np.array_equal(labels == 2, alone.label_map(0) == 1)
    assert (labels == 1).any()
    hidden = scene(front, back)
    assert hidden.box(0, 0) is None
    assert box_of(labels > 0) == hidden.box(0, 1)


def test_object_may_leave_the_picture() -> None:
    body = Body(shape="disc", surface=CLOTH, radius=0.1, centre=(0.5, 0.5, 0, 0), velocity=(-1.0, 0.0))
    whole = scene(body)
    assert [whole.box(t) is None for t in (0, 47)] == [False, True]


def test_background_moves_by_whole_and_broken_pixels() -> None:
    still, right = scene(), scene(pan=(0.25, 0.0))
    assert np.array_equal(right.frame(5)[:, :-5], still.frame(0)[:, 5:])
    half = scene(pan=(0.125, 0.0)).frame(1).astype(int)
    mean = (still.frame(0)[:, :-1].astype(int) + still.frame(0)[:, 1:]) / 2
    assert np.abs(half[:, :-1] - mean).max() <= 1


def test_flash_and_click_come_together() -> None:
    body = Body(shape="disc", surface=CLOTH, radius=0.3, centre=(0.66, 0.5, 0, 0), flash=1.0)
    whole = scene(body, rhythm=Rhythm(rate_hz=2.0, phase=0.15), num_frames=72)
    light = np.array([whole.frame(t).mean() for t in range(whole.num_frames)])
    seen_s = (np.flatnonzero(np.diff(light) > 10) + 1) / 24
    events_s = whole.rhythm.events_s(whole.duration_s)
    assert len(seen_s) == len(events_s) == 6
    assert ((seen_s - events_s >= 0) & (seen_s - events_s <= 1 / 24)).all()  # the first frame after the event
    wave = whole.sound(16000)
    assert len(wave) == 3 * 16000
    assert np.abs(wave).max() <= 1
    for event_s in events_s:
        at = round(event_s * 16000)
        assert np.square(wave[at : at + 160]).mean() > 3 * np.square(wave[at - 160 : at]).mean()


@pytest.mark.parametrize("k", range(4))
def test_pitch_follows_the_motion(k: int) -> None:
    turns = tuple(1.0 if i == k else 0.0 for i in range(4))
    body = Body(shape="disc", surface=CLOTH, radius=0.2, centre=(0.66, 0.5, 0, 0), turns_hz=turns)
    voices = tuple(1.0 if i == k else 0.0 for i in range(4))
    whole = scene(body, voices=voices, hiss=0.0, rhythm=Rhythm(rate_hz=0.01, phase=0.1))
    wave = whole.sound(16000)
    for time_s in (0.25, 0.5, 0.8, 1.4):
        at = round(time_s * 16000)
        rate_hz = np.argmax(np.abs(np.fft.rfft(wave[at - 400 : at + 400] * np.hanning(800), 16000)))
        assert rate_hz == pytest.approx(whole.pitches_hz[k] * 2 ** (0.35 * np.cos(2 * np.pi * time_s)), rel=0.04)


def test_sequences_show_every_object_at_first_and_the_target_always() -> None:
    for number in range(12):
        whole = draw_sequence(3, number, size=96, num_frames=30)
        count = len(whole.bodies)
        assert count == 1 + number % 3
        assert set(np.unique(whole.label_map(0))) == set(range(count + 1))
        assert all(whole.box(t, count - 1) is not None for t in range(30))


def test_image_shows_its_texture() -> None:
    one, two = draw_image(0, 1, 0), draw_image(0, 1, 1)
    assert one.bodies[0].surface.family == "stripes"
    assert two.bodies[0].surface.family == "checks"
    assert one.background.family == two.background.family == "clouds"


def test_unknown_numbers_of_classes() -> None:
    assert len(class_names(6, 5)) == 30
    with pytest.raises(ValueError, match="motions must be 1 to 6, got 7"):
        class_names(7, 1)
    with pytest.raises(ValueError, match="rhythms must be 1 to 5, got 0"):
        class_names(1, 0)


# --- what can be learnt -------------------------------------------------------------------------------------


def look_features(frame: np.ndarray) -> np.ndarray:
    """Colour histograms, an 8 x 8 thumbnail, and gradient directions in 4 x 4 cells."""
    histograms = [np.histogram(frame[..., c], 8, (0, 256))[0] / frame[..., c].size for c in range(3)]
    rows = np.linspace(0, frame.shape[0] - 1, 32).astype(int)
    columns = np.linspace(0, frame.shape[1] - 1, 32).astype(int)
    small = frame[rows][:, columns].mean(2)
    dy, dx = np.gradient(small)
    bins = ((np.arctan2(dy, dx) % np.pi) / np.pi * 7.999).astype(int)
    cells = np.arange(32) // 8
    place = (cells[:, None] * 4 + cells[None]) * 8 + bins
    directions = np.bincount(place.ravel(), np.hypot(dx, dy).ravel(), 128)
    return np.concatenate([*histograms, small[2::4, 2::4].ravel() / 255, directions / directions.sum()])


def motion_features(frames: np.ndarray) -> np.ndarray:
    """Where frames change, how far that wanders, and the spectrum of the mean brightness."""
    step = np.abs(np.diff(frames, axis=0))
    step = np.maximum(step - np.percentile(step, 80, axis=(1, 2), keepdims=True), 0) + 1e-3
    weight = step / step.sum((1, 2), keepdims=True)
    place = np.arange(step.shape[1])
    x, y = (weight.sum(1) * place).sum(1), (weight.sum(2) * place).sum(1)
    spread = np.sqrt(
        (weight.sum(1) * (place - x[:, None]) ** 2).sum(1) + (weight.sum(2) * (place - y[:, None]) ** 2).sum(1)
    )
    light = frames.mean((1, 2))
    jumps = np.diff(light)
    spectra = [np.abs(np.fft.rfft(track - track.mean(), 16)) for track in (x, y, spread, light)]
    return np.concatenate([*spectra, [x.std(), y.std(), spread.std(), jumps.max(), jumps.min(), (jumps > 4).sum()]])


def sound_features(wave: np.ndarray) -> np.ndarray:
    """Energies of 40 logarithmic bands: mean, deviation and slow modulation."""
    pieces = np.lib.stride_tricks.sliding_window_view(wave, 512)[::160] * np.hanning(512)
    power = np.square(np.abs(np.fft.rfft(pieces)))
    edges = np.unique(np.geomspace(4, 256, 41).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-4)
    modulation = np.abs(np.fft.rfft(bands - bands.mean(0), axis=0))[1:8]
    return np.concatenate([bands.mean(0), bands.std(0), modulation.ravel()])


def test_a_frame_does_not_tell_the_class_but_motion_and_sound_do() -> None:
    motions, rhythms, clips = 4, 2, 320
    looks, moves, sounds, labels = [], [], [], []
    for number in range(clips):
        label = number % (motions * rhythms)
        clip = draw_clip(11, number, *divmod(label, rhythms), size=64, seconds=1.6)
        rows = np.linspace(0, clip.height - 1, 32).astype(int)
        columns = np.linspace(0, clip.width - 1, 32).astype(int)
        frames = [clip.frame(2 * t) for t in range(16)]  # 16 frames, stride 2: 1 to 1.3 s
        looks.append(look_features(frames[number % 16]))
        moves.append(motion_features(np.stack([frame[rows][:, columns].mean(2) for frame in frames])))
        sounds.append(sound_features(clip.sound(8000)[:9600]))
        labels.append(label)

    def accuracy(features: list[np.ndarray], strength: float) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        return float(cross_val_score(model, np.stack(features), labels, cv=4).mean())

    chance = 1 / (motions * rhythms)
    assert accuracy(looks, 0.01) < chance + 4 * np.sqrt(chance * (1 - chance) / clips)
    assert accuracy(moves, 0.1) > 0.6
    assert accuracy(sounds, 0.1) > 0.6
