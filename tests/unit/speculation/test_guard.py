"""The guard: no planner goes on drafting at a size where its drafts lose tokens, and an interruption bans nobody."""

import numpy as np
import pytest

from dspark.speculation.cost import StepCost
from dspark.speculation.guard import BAN, CREDIT, Guard
from dspark.speculation.planner import parse_planner
from dspark.speculation.prices import Prices
from dspark.speculation.round import Outcome, Round

COST = StepCost(rows=(1, 64), seconds=(1.0, 4.0), draft_requests=(1,), draft_slots=(1, 7), draft_seconds=((0.3, 0.6),))


def step(planner, requests, accepted, slower=1.0, rest=0):
    """One step of a planner: its slots, and whether anybody drafted."""
    round = Round([7] * requests, (), list(range(requests)), [64] * requests)
    slots = planner.slots(round)
    if not any(slots):
        seconds = float(planner.prices.verifying(round, 0)[0]) * slower
        planner.observe(Outcome(round, slots, [0] * requests, seconds))
        return False
    now = round.drafted(slots, slots)
    plan = planner.plan(now, np.full((requests, 7), 0.99))
    seconds = float(planner.seconds(now, sum(plan))[-1]) * slower
    planner.observe(Outcome(now, plan, [min(accepted, n) for n in plan], seconds, np.full((requests, 7), 0.99)))
    return True


@pytest.mark.parametrize("name", ["greedy", "lagged", "lookahead"])
@pytest.mark.parametrize("requests", [1, 8])
def test_a_drafter_that_is_never_right_is_forbidden_within_few_rounds(name, requests):
    planner = parse_planner(name, COST)
    first = [step(planner, requests, 0) for _ in range(40)]
    assert any(first) and not any(first[-10:])
    assert sum(step(planner, requests, 0) for _ in range(4 * BAN)) < 0.05 * 4 * BAN
    assert planner.rest > 0 or step(planner, requests, 0)


@pytest.mark.parametrize("name", ["greedy", "lagged", "lookahead"])
def test_one_that_is_right_is_let_be_and_a_plain_step_is_rare(name):
    planner = parse_planner(name, COST)
    drafted = [step(planner, 2, 5, slower=50.0 if number == 100 else 1.0) for number in range(400)]
    assert np.mean(drafted) > 0.98


def test_a_ban_ends_and_comes_back_longer():
    guard, bans = Guard(), []
    guard._learn(4, False, 1.0)  # a plain step was seen
    for _ in range(200):
        if guard.allows(4):
            guard._book(4, -1.0)
        elif guard.rest(4):
            bans.append(1 + guard.rest(4))
            guard._account(4).banned = 0
    assert bans[:3] == [BAN, 2 * BAN, 4 * BAN]
    assert guard._account(4).credit > -CREDIT


def test_plain_steps_of_a_rest_are_learnt_unless_they_took_in_prompts():
    guard, prices, round = Guard(), Prices(COST), Round([0], (), [1], [64])
    plain = float(prices.verifying(round, 0)[0])
    for _ in range(60):
        guard.observe(
            Outcome(round, [0], [0], 90 * plain, rest_steps=30, bare_seconds=30 * plain, bare_steps=20), prices
        )
    assert guard.factor(1, drafting=False) == pytest.approx(1.5, rel=0.05)
    guard.observe(Outcome(round, [0], [0], 9e3 * plain, rest_steps=30), prices)
    assert guard.factor(1, drafting=False) == pytest.approx(1.5, rel=0.05)
