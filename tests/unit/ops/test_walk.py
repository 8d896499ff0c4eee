"""The walk's kernel beside its plain twin, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.ops.cpu import load_kernels
from dspark.ops.walk import walk, walk_plain

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")


@st.composite
def rounds(draw):
    """Few levels of confidence, so that ties are common; limits and asked slots of every kind; cliffs and flats."""
    requests, slots = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    levels = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]) | st.floats(0.0, 1.0)
    value_RK = np.cumprod(draw(table(levels, requests, slots)), axis=1)
    value_RK *= np.array(draw(table(st.sampled_from([1.0, 1.0, 4.0, 0.3]), requests, 1)))
    ahead_KK = np.triu(np.cumprod(np.where(np.tri(slots, k=-1).T, draw(table(levels, 1, slots)), 1.0), axis=1))
    asked_R = [draw(st.integers(0, slots)) for _ in range(requests)]
    limit_R = [draw(st.integers(0, asked)) for asked in asked_R]
    rise = st.sampled_from([0.0, 0.0, 0.05, 0.4, 1.5]) | st.floats(0.0, 1.0)
    seconds_N1 = 1.0 + np.cumsum([0.0, *draw(table(rise, 1, sum(asked_R)))[0]])
    rate = draw(st.none() | st.floats(0.1, 3.0))
    return (value_RK, limit_R, asked_R, ahead_KK, seconds_N1), {"committed": float(requests), "rate": rate}


def table(of, rows, columns):
    return st.lists(st.lists(of, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


@needs_kernels
@given(rounds())
def test_the_kernel_is_its_plain_twin(given):
    arrays, terms = given
    assert walk(*arrays, **terms) == walk_plain(*arrays, **terms)


@needs_kernels
@pytest.mark.parametrize("rate", [None, 80.0])
def test_so_it_is_for_many_requests(rate):
    random = np.random.default_rng(0)
    for _ in range(20):
        value_RK = np.cumprod(random.uniform(0.4, 1.0, (64, 7)), axis=1)
        ahead_KK = np.triu(np.cumprod(np.where(np.tri(7, k=-1).T, 0.7, 1.0), axis=1))
        limit_R = random.integers(0, 8, 64).tolist()
        seconds_N1 = 0.01 + np.cumsum(random.uniform(0.0, 1e-4, 449))
        given = (value_RK, limit_R, [7] * 64, ahead_KK, seconds_N1)
        found = walk(*given, committed=64, rate=rate)
        assert found == walk_plain(*given, committed=64, rate=rate)
        assert any(found)


@needs_kernels
def test_prices_that_end_too_early_are_refused():
    with pytest.raises(RuntimeError, match="seconds end at 2 rows"):
        walk(np.ones((2, 2)), [2, 2], [2, 2], np.ones((2, 2)), np.ones(3))
