"""Sums over steps: expected and realised accepts, budgets, rests; prices beside times, and speculation beside none."""

import numpy as np
import pytest

from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.ledger import BUDGETS, Ledger, Priced
from dspark.speculation.live_cost import LiveCost

SURVIVAL = np.array([[0.9, 0.5, 0.1], [0.8, 0.4, 0.2]])


def test_expectations_are_of_what_was_verified():
    ledger = Ledger()
    ledger.draft(SURVIVAL, [2, 1], [2, 0], audited=1)
    assert ledger.expected == pytest.approx(0.9 + 0.5 + 0.8) and ledger.realised == 2
    assert (ledger.verified, ledger.audited, ledger.drafting_steps) == (3, 1, 1)
    ledger.draft(SURVIVAL, [0, 0], [0, 0])
    ledger.draft(np.full((2, 3), np.nan), [3, 3], [3, 1])  # nobody read the confidences
    assert ledger.expected == pytest.approx(2.2) and ledger.realised == 2 and ledger.verified == 9
    assert ledger.budgets[0] == 1 and ledger.budgets[2] == 1 and ledger.budgets[3] == 1  # 0, 2–3, 4–7
    ledger.draft(np.ones((1, 1)), [10**6], [0])
    assert ledger.budgets[BUDGETS - 1] == 1 and sum(ledger.budgets) == ledger.drafting_steps == 4


def test_rests_are_counted_and_end_with_a_draft():
    ledger = Ledger()
    ledger.rest()
    ledger.rest()
    assert ledger.resting and ledger.resting_steps == 2
    ledger.draft(SURVIVAL, [1, 1], [0, 0])
    assert not ledger.resting


COST = StepCost.of_table([1.0, 1.1, 1.2, 1.3], draft_requests=(1,), draft_slots=(1, 3), draft_seconds=((0.1, 0.2),))


def step(rows, requests, drafting, slots, seconds, committed, prefill=0):
    return StepTime(rows, requests, 0, prefill, drafting, slots, 0.1 * bool(drafting), seconds, committed)


def test_speculation_is_held_against_the_price_of_plain_steps():
    priced = Priced()
    priced.observe(step(4, 1, 1, 3, 2.0, committed=3), COST)  # price 1.3 + 0.2, plain 3 × 1.0
    assert priced.predicted == pytest.approx(1.5) and priced.error == pytest.approx(0.5)
    assert priced.plain == pytest.approx(3.0) and priced.spent == 2.0
    priced.observe(step(2, 2, 0, 0, 1.0, committed=2), COST)  # nobody drafts: its own plain step
    assert priced.plain == pytest.approx(4.0) and priced.spent == 3.0 and priced.error == pytest.approx(0.6)
    priced.observe(step(2, 1, 1, 1, 1.0, committed=2, prefill=1), COST)
    assert priced.steps == 3 and priced.spent == 3.0 and priced.measured == 4.0


def test_a_live_cost_is_judged_by_what_it_said_before():
    live = LiveCost(COST)
    for _ in range(200):
        live.observe(step(1, 1, 0, 0, 2.0, committed=1))
    first = live.priced.error / live.priced.steps
    before = (live.priced.error, live.priced.steps)
    for _ in range(200):
        live.observe(step(1, 1, 0, 0, 2.0, committed=1))
    later = (live.priced.error - before[0]) / (live.priced.steps - before[1])
    assert later < 0.1 < first
