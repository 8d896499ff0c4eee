"""Rows hold whole pieces within the budget, every epoch all of them once, found from the step alone."""

from hypothesis import given
from hypothesis import strategies as st

from dspark.training.packing import Packing

SIZES = st.lists(st.integers(1, 32), min_size=1, max_size=60)


@given(SIZES, st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_has_every_piece_once_within_the_budget(sizes, batch, seed):
    packing = Packing(sizes, 32)
    count = len(packing)
    rows = [row for step in range(2 * count) for row in packing.rows(step, batch, seed)][: 2 * count]
    for epoch in (rows[:count], rows[count:]):
        assert sorted(number for row in epoch for number in row) == list(range(len(sizes)))
        assert all(sum(sizes[number] for number in row) <= 32 for row in epoch)


@given(SIZES)
def test_no_two_rows_fit_into_one(sizes):
    filled = sorted(sum(sizes[number] for number in row) for row in Packing(sizes, 32).plain())
    assert len(filled) < 2 or filled[0] + filled[1] > 32


def test_a_step_is_the_same_whatever_was_read_before():
    sizes = [(7 * i) % 13 + 1 for i in range(50)]
    walked, fresh = Packing(sizes, 20), Packing(sizes, 20)
    steps = [walked.rows(step, 3, seed=4) for step in range(40)]
    assert fresh.rows(39, 3, seed=4) == steps[39]
    assert fresh.rows(0, 3, seed=4) == steps[0]
    assert len({tuple(packing) for packing in (walked.epoch(0, 4), walked.epoch(1, 4), walked.epoch(0, 5))}) == 3


def test_small_pieces_fill_what_large_ones_leave():
    packing = Packing([6, 4, 7, 3, 5, 5], 10)
    assert len(packing) == 3 and packing.waste == 0
    assert Packing([6, 4], 0).plain() == [(0,), (1,)]
