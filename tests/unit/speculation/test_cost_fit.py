"""Fitting a price to steps whose true price is known, with noise and interruptions; keeping it true while it moves."""

from dataclasses import replace

import numpy as np
import pytest

from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.cost_fit import fit_cost, never_falling, recalibrated
from dspark.speculation.live_cost import AGREEING, EXPLORE_EVERY, LiveCost

TRUE = StepCost(
    rows=(1, 8, 64, 512),
    seconds=(1e-3, 1.4e-3, 4e-3, 30e-3),
    per_request=2e-5,
    per_context=4e-7,
    per_attended=3e-8,
    prefill_weight=0.8,
    draft_requests=(1, 64),
    draft_slots=(1, 7),
    draft_seconds=((4e-4, 5e-4), (4e-3, 12e-3)),
    draft_per_context=1e-7,
)


def step(rows, requests, context, *, prefill=0, slots=0, noise=1.0, cost=TRUE):
    drafting = requests if slots else 0
    target = float(cost.target(rows, requests=max(requests, 1), context=context, prefill=prefill)) * noise
    draft = float(cost.draft(drafting, slots, context=context)) * noise
    return StepTime(rows, requests, context, prefill, drafting, slots, draft, target + draft)


def measured(seed=0, spread=0.03, interrupted=0.02):
    """Steps as a profile sees them, some of them interrupted for a long time."""
    random = np.random.default_rng(seed)
    steps = []
    for requests in (1, 2, 4, 8, 16, 32, 64):
        for slots in (0, 1, 2, 3, 5, 7):
            for context in (40, 60, 400):
                for _ in range(3):
                    noise = random.normal(1, spread) * (5 if random.random() < interrupted else 1)
                    steps.append(step(requests * (1 + slots), requests, context * requests, slots=slots, noise=noise))
    steps += [step(8, 8, 8 * 100, prefill=rows, noise=random.normal(1, spread)) for rows in (100, 200, 400)]
    return steps


def test_the_fit_finds_the_price_behind_noise_and_interruptions():
    cost = fit_cost(measured())
    for requests, slots, context in ((1, 0, 50), (1, 7, 300), (6, 3, 100), (24, 5, 200), (64, 7, 80)):
        rows, load = requests * (1 + slots), {"requests": requests, "context": requests * context}
        assert cost.target(rows, **load) == pytest.approx(float(TRUE.target(rows, **load)), rel=0.06)
        draft = float(TRUE.draft(requests, slots, context=requests * context))
        assert cost.draft(requests, slots, context=requests * context) == pytest.approx(draft, rel=0.1)
    assert cost.prefill_weight == pytest.approx(0.8, abs=0.1)


def test_a_fit_without_drafts_has_no_draft_price():
    cost = fit_cost([step(r, r, 40 * r) for r in (1, 2, 4, 8) for _ in range(3)])
    assert cost.draft_seconds == () and cost.draft(4, 4) == 0


def test_never_falling_averages_what_is_out_of_order():
    assert never_falling([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert never_falling([3.0, 1.0], [3.0, 1.0]) == [2.5, 2.5]


def drive(live, cost, steps, seed=1):
    random = np.random.default_rng(seed)
    for _ in range(steps):
        requests = 8 if random.random() < 0.5 else 1
        noise = 20.0 if random.random() < 0.02 else random.normal(1, 0.05)
        live.observe(step(requests * 8, requests, 50 * requests, slots=7, noise=noise, cost=cost))


def scaled(factor):
    fields = TRUE.as_dict()
    fields["seconds"] = tuple(s * factor for s in TRUE.seconds)
    fields["draft_seconds"] = tuple(tuple(s * factor for s in row) for row in TRUE.draft_seconds)
    return StepCost(**fields)


@pytest.mark.parametrize("split", [True, False])
def test_a_machine_that_becomes_slower_is_followed_and_interruptions_are_not(split):
    live = LiveCost(TRUE, split=split)
    drive(live, TRUE, 300)
    assert float(live.cost.target(64)) == pytest.approx(float(TRUE.target(64)), rel=0.05)
    slow = scaled(2.0)
    drive(live, slow, 900, seed=2)
    load = {"requests": 8, "context": 400}
    want = float(slow.target(64, **load) + slow.draft(8, 7, context=400))
    got = float(live.cost.target(64, **load) + live.cost.draft(8, 7, context=400))
    assert got == pytest.approx(want, rel=0.1)


def test_one_row_count_that_was_measured_wrong_is_put_right():
    fields = TRUE.as_dict() | {"seconds": (1e-3, 1.4e-3, 4e-3 * 1.5, 30e-3)}
    live = LiveCost(StepCost(**fields))
    drive(live, TRUE, 2000)
    assert float(live.cost.target(64)) == pytest.approx(float(TRUE.target(64)), rel=0.08)
    assert float(live.cost.target(8)) == pytest.approx(float(TRUE.target(8)), rel=0.08)


def dearer_drafts(factor):
    return replace(TRUE, draft_seconds=tuple(tuple(s * factor for s in row) for row in TRUE.draft_seconds))


@pytest.mark.parametrize("factor", [8.0, 0.125])
def test_drafts_measured_on_a_busy_machine_are_put_right_by_the_few_there_are(factor):
    live = LiveCost(dearer_drafts(factor))
    random = np.random.default_rng(2)
    for number in range(2000):
        slots = 7 if number % 50 < 3 else 0
        live.observe(step(1 + slots, 1, 50, slots=slots, noise=random.normal(1, 0.05)))
    assert float(live.cost.draft(1, 7)) == pytest.approx(float(TRUE.draft(1, 7)), rel=0.2)
    assert float(live.cost.target(1)) == pytest.approx(float(TRUE.target(1)), rel=0.1)


def test_a_few_interruptions_on_end_move_no_price():
    live = LiveCost(TRUE)
    for number in range(4000):
        noise = 10.0 if number % 400 < 4 * (AGREEING - 2) else 1.0 + 0.05 * (-1) ** number
        live.observe(step(8, 1, 50, slots=7, noise=noise))
    assert float(live.cost.target(8)) == pytest.approx(float(TRUE.target(8)), rel=0.1)


def test_exploring_is_rare_and_near():
    live = LiveCost(TRUE)
    drive(live, TRUE, 10)
    answers = [live.explore(8, 64) for _ in range(4 * EXPLORE_EVERY)]
    assert sum(answer != 8 for answer in answers) <= 4
    assert LiveCost(TRUE).explore(3, 4) == 3


def test_a_profile_is_recalibrated_to_the_steps_under_load_and_their_stalls():
    random = np.random.default_rng(3)
    slow = scaled(1.3)
    steps = []
    for _ in range(2000):
        requests, noise = int(random.integers(1, 65)), 5.0 if random.random() < 0.05 else 1.0
        steps.append(step(requests * 4, requests, 50 * requests, slots=3, noise=noise, cost=slow))
    cost = recalibrated(TRUE, steps, outside=0.03)
    for requests in (2, 16, 64):
        load = {"requests": requests, "context": 50 * requests}
        assert cost.target(requests * 4, **load) == pytest.approx(float(slow.target(requests * 4, **load)), rel=0.05)
        draft = float(slow.draft(requests, 3, context=50 * requests))
        assert cost.draft(requests, 3, context=50 * requests) == pytest.approx(draft, rel=0.05)
    every, each = cost.stalls
    assert every * each == pytest.approx(0.05 * 4, rel=0.2)  # four times a step, once in twenty
    assert cost.outside == 0.03
    assert recalibrated(TRUE, []) == TRUE
