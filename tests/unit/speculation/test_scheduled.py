"""Scheduled planners against brute force over all length vectors, and what every plan must keep."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.common.errors import UserError
from dspark.speculation.cost import StepCost
from dspark.speculation.planner import parse_planner
from dspark.speculation.prices import Prices
from dspark.speculation.round import Outcome, Round
from dspark.speculation.scheduled import Greedy, Lagged, Lookahead, RunningMeans

STAIRS = StepCost.of_table([1.0, 1.0, 1.1, 1.1, 1.9, 1.9, 1.9, 2.6, 2.7, 2.7, 3.5, 3.5])
PRICED = ("greedy", "lagged", "lookahead")


def throughput(a_RK, plan, cost=STAIRS):
    tokens = sum(1 + float(row[:length].sum()) for row, length in zip(a_RK, plan, strict=True))
    return tokens / float(cost.target(len(plan) + sum(plan), requests=len(plan)))


def every_plan(limit_R):
    return product(*(range(limit + 1) for limit in limit_R))


def printed(a_RK, limit_R, cost=STAIRS):
    """Algorithm 1, line by line."""
    order = sorted(
        ((r, k) for r, limit in enumerate(limit_R) for k in range(limit)), key=lambda rk: (-a_RK[rk], rk[1], rk[0])
    )
    plan = [0] * len(limit_R)
    for r, _ in order:
        longer = [*plan[:r], plan[r] + 1, *plan[r + 1 :]]
        if throughput(a_RK, longer, cost) <= throughput(a_RK, plan, cost):
            break
        plan = longer
    return plan


levels = st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.8, 0.9, 1.0])  # few values, so that ties are common
confidences = st.lists(st.lists(levels, min_size=3, max_size=3), min_size=1, max_size=3)
stairs = st.lists(st.sampled_from([0.0, 0.0, 0.05, 0.1, 0.4, 0.9]), min_size=12, max_size=12).map(
    lambda rises: StepCost.of_table((1.0 + np.cumsum(rises)).tolist())
)


@given(confidences, stairs, st.data())
def test_greedy_is_algorithm_1(confidence, cost, data):
    a_RK = np.cumprod(confidence, axis=1)
    limit_R = [data.draw(st.integers(0, 3)) for _ in confidence]
    assert Greedy(Prices(cost)).plan(Round(limit_R), a_RK) == printed(a_RK, limit_R, cost)


@given(confidences, stairs, st.data())
def test_lagged_spends_an_old_budget_best(confidence, cost, data):
    planner, old, new = (
        Lagged(Prices(cost), lag=1),
        np.cumprod(confidence, axis=1),
        np.cumprod(confidence, axis=1)[::-1],
    )
    limit_R = [data.draw(st.integers(0, 3)) for _ in confidence]
    assert planner.plan(Round(limit_R), old) == limit_R
    budget = sum(planner.plan(Round(limit_R), new))
    rates = [throughput(old, plan, cost) for plan in every_plan(limit_R)]
    spent = [throughput(old, plan, cost) for plan in every_plan(limit_R) if sum(plan) == budget]
    assert max(spent) == pytest.approx(max(rates))
    plan = planner.plan(Round(limit_R), new)
    worth = {p: sum(float(row[:n].sum()) for row, n in zip(new, p, strict=True)) for p in every_plan(limit_R)}
    same = [w for p, w in worth.items() if sum(p) == sum(plan)]
    assert worth[tuple(plan)] == pytest.approx(max(same))


@given(st.lists(levels, min_size=1, max_size=3), stairs, st.data())
def test_lookahead_finds_the_best_plan_where_its_expectations_hold(first, cost, data):
    """Confidences past the first slot equal the running means: then no plan of all is better, cliffs or not."""
    means = [data.draw(levels) for _ in range(2)]
    a_RK = np.cumprod([[c, *means] for c in first], axis=1)
    planner = Lookahead(Prices(cost))
    planner.means.reached_K, planner.means.passed_K = np.ones(3), np.array([0.7, *means])
    plan = planner.plan(Round([3] * len(first)), a_RK)
    best = max(throughput(a_RK, p, cost) for p in every_plan([3] * len(first)))
    assert throughput(a_RK, plan, cost) == pytest.approx(best, rel=1e-9)


@given(st.sampled_from(PRICED), confidences, stairs, st.data())
def test_every_plan_fits_and_no_slot_past_a_decision_moves_it(name, confidence, cost, data):
    """What lies behind the first slot that is not verified may be anything: the plan stays what it was."""
    a_RK = np.cumprod(confidence, axis=1)
    limit_R = [data.draw(st.integers(0, 3)) for _ in confidence]
    plan = parse_planner(name, cost).plan(Round(limit_R), a_RK)
    assert all(0 <= length <= limit for length, limit in zip(plan, limit_R, strict=True))
    if name == "lagged":
        return  # its first plans are full
    other = a_RK.copy()
    for r, length in enumerate(plan):
        for k in range(length + 1, 3):
            other[r, k] = other[r, k - 1] * data.draw(levels)
    assert parse_planner(name, cost).plan(Round(limit_R), other) == plan


@given(confidences, stairs, st.integers(0, 2), levels)
def test_more_survival_is_never_verified_less(confidence, cost, at, raised):
    """Under greedy, a higher confidence of the first request never shortens its own plan."""
    low, high = np.array(confidence), np.array(confidence)
    high[0, at] = max(high[0, at], raised)
    plans = [Greedy(Prices(cost)).plan(Round([3] * len(low)), np.cumprod(c, axis=1)) for c in (low, high)]
    assert plans[1][0] >= plans[0][0]


def test_ties_go_by_slot_then_request():
    one_more_row = StepCost.of_table([1.0, 1.0, 1.0, 1.1, 9.0, 9.0, 9.0, 9.0])
    a_RK = np.full((3, 2), 0.5)
    assert Greedy(Prices(one_more_row)).plan(Round([2, 2, 2]), a_RK) == [1, 0, 0]
    assert Lookahead(Prices(one_more_row)).plan(Round([2, 2, 2]), a_RK) == [1, 0, 0]


def test_lookahead_crosses_a_dip_where_greedy_stops():
    """Two rows cost as much as eight, so one more token is not worth it and five are."""
    cost = StepCost.of_table([1.0] + [2.5] * 7)
    a_RK = np.cumprod(np.full((1, 6), 0.95), axis=1)
    planner = Lookahead(Prices(cost))
    planner.means.observe(a_RK, [6])
    for _ in range(200):
        planner.means.observe(a_RK, [6])
    assert Greedy(Prices(cost)).plan(Round([6]), a_RK) == [0]
    assert planner.plan(Round([6]), a_RK) == [6]


def test_running_means_are_of_what_survives():
    means = RunningMeans()
    for _ in range(400):
        means.observe(np.array([[0.8, 0.4], [0.2, 0.02]]), [2, 2])
    np.testing.assert_allclose(means.ahead(2), [[1.0, 0.42], [0.0, 1.0]], atol=1e-3)  # (0.4 + 0.02) / (0.8 + 0.2)


def test_means_learn_from_outcomes_before_the_next_round():
    planner = Lookahead(Prices(STAIRS))
    planner.observe(Outcome(Round([2]), [1], [1], 0.1, np.array([[0.9, 0.9]])))
    assert planner.means.ahead(2)[0, 1] > 0.8


def test_priced_planners_need_a_cost():
    with pytest.raises(UserError, match="profile"):
        parse_planner("greedy")
    assert isinstance(parse_planner("greedy", STAIRS), Greedy)


@pytest.mark.parametrize("name", PRICED)
def test_nothing_drafted_nothing_verified(name):
    assert parse_planner(name, STAIRS).plan(Round([0, 0]), None) == [0, 0]
    assert parse_planner(name, STAIRS).plan(Round([0, 2], [0, 2]), np.array([[0.0, 0.0], [1.0, 1.0]]))[0] == 0
