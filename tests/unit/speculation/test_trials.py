"""Trials cost what they lose, within a share of the time."""

from dspark.speculation.trials import EXPLORE, HALF, PATIENCE, STEPS, Trials


def rich(seconds=1.0):
    """An allowance of so many seconds."""
    trials = Trials()
    while trials.allowance < seconds:
        trials.earn(1.0 / EXPLORE, 1e9)
    return trials


def test_a_trial_is_started_by_what_it_is_expected_to_lose_and_paid_in_full():
    trials = rich()
    assert not trials.start([1], 1.0)
    assert trials.start([1, 2], 1.0, expected=0.9)
    assert trials.allowance == rich().allowance - STEPS * 1.0
    assert trials.running == {1: 0.5, 2: 0.5} and trials.started == 1


def test_the_time_of_its_tokens_comes_back_and_no_more():
    for tokens, back in ((0, 0.0), (2, 2.0), (100, STEPS * 1.0)):
        trials = rich(STEPS)
        before = trials.allowance
        trials.start([1], 1.0)
        assert trials.settle(tokens, 1.0) == (tokens >= STEPS)
        assert trials.allowance == before - STEPS + back and not trials.running


def test_one_that_took_longer_than_its_price_is_paid_in_full():
    trials = rich(9.0)
    before = trials.allowance
    trials.start([1], 1.0)
    assert not trials.settle(STEPS, 1.0, took=STEPS + 2.0)
    assert trials.allowance == before - (STEPS + 2.0) + STEPS


def test_the_dearest_trial_is_saved_for():
    trials = Trials()
    for _ in range(100):
        trials.earn(1.0, 0.01)
    assert trials.allowance < STEPS * 1.0 and not trials.start([1], 1.0)
    steps = 0
    while not trials.start([1], 1.0):
        trials.earn(1.0, 0.01)
        steps += 1
    assert steps <= STEPS / EXPLORE


def test_they_become_rarer_while_they_bring_little():
    trials, cost = rich(1e6), STEPS * 1.0
    for _ in range(9):
        trials.start([1], 1.0)
        trials.settle(0, 1.0)
    assert trials.patience == PATIENCE
    trials.start([1], 1.0)
    trials.settle(int(cost * HALF) + 1, 1.0)  # not enough, but not hopeless
    assert trials.patience == PATIENCE
    trials.start([1], 1.0)
    trials.settle(int(cost) + 1, 1.0)
    assert trials.patience == 1


def test_those_come_first_who_have_not_drafted_for_longest():
    trials = Trials()
    for request in (3, 1):
        trials.earn(1.0, 1.0)
        trials.drafted([request])
    assert trials.oldest([1, 2, 3], 2) == [2, 3]
