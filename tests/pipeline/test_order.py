import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.pipeline.order import Cursor, Order, permute


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_permute_is_a_bijection_at_any_size(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(2, 10**12), st.integers(0, 100))
def test_any_position_is_independent_of_the_others(size, key):
    positions = np.array([0, size // 3, size - 1])
    together = permute(positions, size, key)
    assert [int(permute(np.array([p]), size, key)[0]) for p in positions] == together.tolist()
    assert together.max() < size


def test_epochs_and_seeds_differ():
    order = Order(num_records=1000, seed=1)
    positions = np.arange(1000)
    first, second = order.records(0, positions), order.records(1, positions)
    assert (first == second).sum() < 20
    assert (first == Order(num_records=1000, seed=2).records(0, positions)).sum() < 20
    assert abs(np.corrcoef(positions, first)[0, 1]) < 0.1


def test_repeat_visits_every_record_that_often_with_new_draws():
    order = Order(num_records=7, repeat=3)
    positions = np.arange(len(order))
    assert np.bincount(order.records(4, positions)).tolist() == [3] * 7
    draws = np.concatenate([order.draws(epoch, positions) for epoch in range(3)])
    assert len(set(draws.tolist())) == 63


def test_picks_replace_the_records():
    order = Order(num_records=5, picks=np.array([4, 4, 0]))
    assert sorted(order.records(0, np.arange(3)).tolist()) == [0, 4, 4]
    unshuffled = Order(num_records=5, picks=np.array([4, 4, 0]), shuffle=False)
    assert unshuffled.records(0, np.arange(3)).tolist() == [4, 4, 0]


@pytest.mark.parametrize("picks", [np.array([5]), np.array([-1]), np.array([], int)])
def test_bad_picks_are_refused(picks):
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        Order(num_records=5, picks=picks)


def test_empty_selection_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Order(num_records=0)


def test_cursor_refuses_another_data_set():
    Cursor(index_digest="aa").check("aa")
    with pytest.raises(ValueError, match="aa, but the one given is bb"):
        Cursor(index_digest="aa").check("bb")
