import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.pipeline.draws import Draws, fold, fold_array, uniforms


@given(st.lists(st.one_of(st.integers(0, 2**63), st.text(max_size=8)), min_size=1, max_size=4))
def test_fold_depends_on_every_part(parts):
    key = fold(*parts)
    assert 0 <= key < 2**64
    assert fold(*parts) == key
    assert fold(*parts, 0) != key


def test_fold_array_continues_fold():
    keys = np.array([fold(5), fold(6)], np.uint64)
    numbers = np.array([11, 12])
    assert fold_array(keys, numbers, "view").tolist() == [fold(5, 11, "view"), fold(6, 12, "view")]


def test_uniforms_are_uniform_and_equal_the_scalar_stream():
    values = uniforms(np.array([fold("a"), fold("b")], np.uint64), 20000)
    rng = Draws("a")
    assert [rng.uniform() for _ in range(5)] == values[0, :5].tolist()
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    expected = values.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 19 degrees of freedom, p ~ 5e-6
    assert abs(np.corrcoef(values)[0, 1]) < 0.05


@given(st.integers(1, 60), st.integers(0, 2**40))
def test_distinct_draws_without_replacement(high, key):
    count = min(high, 10)
    drawn = Draws(key).distinct(high, count)
    assert len(set(drawn)) == count
    assert all(0 <= value < high for value in drawn)


def test_shuffle_is_a_fair_permutation():
    first = [Draws(i).shuffle(range(4))[0] for i in range(4000)]
    assert all(850 < first.count(value) < 1150 for value in range(4))


def test_bad_requests_name_the_value():
    with pytest.raises(ValueError, match="got 0"):
        Draws(1).integer(0)
    with pytest.raises(ValueError, match="cannot draw 3"):
        Draws(1).distinct(2, 3)
