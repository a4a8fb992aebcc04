"""Pure functions of time: one clock, the rate of a source, the frame of an instant."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.pipeline.pack.timeline import Cadence, Clock, frame_rate, frames_until

MS = Fraction(1, 1000)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.fractions(Fraction(1), Fraction(60), max_denominator=1001),
)
def test_every_instant_shows_the_frame_of_that_time(steps, fps):
    times = [Fraction(0), *(Fraction(int(t), 1000) for t in np.cumsum(steps))]
    end_s = times[-1] + Fraction(1, 25)
    cadence = Cadence(fps, Fraction(0))
    out = [item for number, time in enumerate(times) for item in cadence.push(time, number)]
    out += cadence.finish(end_s)
    assert len(out) == max(frames_until(end_s, fps), math.ceil(times[-1] * fps), 1) == cadence.count
    for k, shown in enumerate(out):
        assert shown == max(number for number, time in enumerate(times) if time <= k / fps)
    assert len(set(out)) == len(times) - cadence.dropped


@pytest.mark.parametrize(
    "fps", [Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(240)]
)
@pytest.mark.parametrize("tick", [MS, Fraction(1, 90000), Fraction(1, 14400)])
def test_rounded_times_of_a_constant_rate_give_every_frame_once(fps, tick):
    ticks = np.array([round(n / fps / tick) for n in range(500)])
    rate = frame_rate(ticks, tick, [fps])
    assert rate.fps == fps
    assert rate.constant
    cadence = Cadence(rate.fps, rate.tolerance_s)
    out = [item for number, time in enumerate(ticks.tolist()) for item in cadence.push(time * tick, number)]
    out += cadence.finish(int(ticks[-1]) * tick + round(1 / fps / tick) * tick)
    assert out == list(range(500))


def test_the_rate_is_found_without_being_declared():
    for fps in (Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(12), Fraction(25, 2)):
        ticks = np.array([round(n / fps * 90000) for n in range(300)])
        rate = frame_rate(ticks, Fraction(1, 90000), [None])
        assert rate.constant
        assert abs(rate.fps - fps) < fps / 2000


def test_a_wrong_declaration_is_not_believed():
    ticks = np.arange(100) * 3600
    assert frame_rate(ticks, Fraction(1, 90000), [Fraction(50), Fraction(90000)]).fps == 25


def test_trembling_times_are_one_rate_and_every_frame_is_shown_once():
    rng = np.random.default_rng(0)
    ticks = np.arange(200) * 3000 + rng.integers(-300, 300, 200)
    rate = frame_rate(ticks, Fraction(1, 90000), [Fraction(30)])
    assert rate.fps == 30
    assert not rate.constant
    cadence = Cadence(rate.fps, rate.tolerance_s)
    first = int(ticks[0])
    out = [item for n, t in enumerate(ticks.tolist()) for item in cadence.push(Fraction(t - first, 90000), n)]
    assert out + list(cadence.finish(Fraction(200, 30))) == list(range(200))


def test_dropped_frames_and_pauses_do_not_change_the_rate():
    kept = [n for n in range(300) if n % 7 and not 100 < n < 160]
    rate = frame_rate(np.array(kept) * 3000, Fraction(1, 90000), [Fraction(27)])
    assert rate.fps == 30


def test_one_frame_takes_the_declared_rate():
    assert frame_rate(np.array([7]), MS, [Fraction(10)]).fps == 10
    assert frame_rate(np.array([], np.int64), MS, [None]).fps == 25


def test_an_instant_just_before_the_end_is_left_out():
    assert frames_until(Fraction(4), Fraction(25)) == 100
    assert frames_until(Fraction(4) + Fraction(1, 1000), Fraction(25)) == 100
    assert frames_until(Fraction(4) + Fraction(2, 100), Fraction(25)) == 101


def test_limits_stop_the_cadence():
    cadence = Cadence(Fraction(10), Fraction(0), Fraction(1, 2))
    out = [item for n in range(20) for item in cadence.push(Fraction(n, 10), n)]
    assert out == [0, 1, 2, 3, 4]
    assert cadence.full
    assert list(cadence.finish(Fraction(2))) == []


def test_the_clock_moves_all_streams_of_a_joint_by_the_same_amount():
    clock = Clock(joined=True)
    step = Fraction(1, 25)
    for n in range(10):
        assert clock.move(0, 5 + n * step, step) == 0
        assert clock.move(1, 5 + n * step + Fraction(1, 100), step) == 0
    assert clock.move(0, Fraction(2), step) is None  # picture starts again at 2 s, if the next one agrees
    moved = clock.move(0, 2 + step, step)
    assert moved == 5 + 10 * step - 2
    assert clock.move(1, 5 + 10 * step, step) == 0  # sound has not reached the joint
    assert clock.move(1, Fraction(2), step) is None
    assert clock.move(1, 2 + step, step) == moved
    assert clock.joints == 1
    assert (clock.section(0), clock.section(1)) == (1, 1)


@pytest.mark.parametrize("joined", [True, False])
def test_a_long_hole_is_a_joint_only_where_files_are_joined(joined):
    clock = Clock(joined=joined)
    clock.move(0, Fraction(0), MS)
    assert clock.move(0, Fraction(60), MS) is None
    moved = clock.move(0, 60 + MS, MS)
    assert clock.agreed
    assert (moved != 0) == joined
    if joined:
        assert 60 + moved == MS  # goes on as if there were no hole


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("wrong_s", [-5, 55, 300, 100_000])
def test_one_damaged_timestamp_is_ignored(joined, wrong_s):
    clock = Clock(joined=joined)
    step = Fraction(1, 25)
    moves = [clock.move(0, 50 + (n * step if n != 7 else wrong_s), step) for n in range(20)]
    assert moves == [0] * 7 + [None] + [0] * 12
    assert clock.joints == 0


def test_pictures_that_stand_for_seconds_keep_their_times():
    clock = Clock(joined=False)
    moves = []
    for n in range(9):
        move = clock.move(0, Fraction(5 * n), Fraction(0))
        moves.append(move)
        if clock.agreed:
            moves[-2] = move
    assert moves == [0] * 9  # the last two agree with each other
    assert clock.move(0, Fraction(50), Fraction(0)) is None
    assert clock.settle(0) == 0
    assert clock.move(1, Fraction(0), MS) == 0
    assert clock.move(1, Fraction(100_000), MS) is None
    assert clock.settle(1) is None


def test_small_steps_back_and_pauses_are_left_alone():
    clock = Clock(joined=True)
    clock.move(0, Fraction(1), MS)
    assert clock.move(0, Fraction(9, 10), MS) == 0
    assert clock.move(0, Fraction(2), MS) == 0
    assert clock.move(0, None, MS) == 0
