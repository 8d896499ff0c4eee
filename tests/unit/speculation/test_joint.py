"""The joint planner: drafts where it pays and nowhere else, finds requests that turn, keeps promises and priorities."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.common.sampling_params import SamplingParams
from dspark.ops.walk import walk
from dspark.speculation.acceptance import Acceptance
from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.finished import Finished
from dspark.speculation.joint import Joint
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.prices import Prices
from dspark.speculation.round import Outcome, Round

COST = StepCost(
    rows=(1, 8, 64),
    seconds=(1.0, 1.8, 9.0),
    draft_requests=(1, 8),
    draft_slots=(1, 7),
    draft_seconds=((0.3, 0.6), (1.0, 2.5)),
)
SLOTS = 7


def serve(planner, chances, steps, params=None, seed=0, told=None):
    """Steps of requests whose drafts are accepted with the given chance a slot, as confidences say or `told` does."""
    rng = np.random.default_rng(seed)
    prices, log = planner.prices, []
    for step in range(steps):
        chance_R = [c(step) if callable(c) else c for c in chances]
        requests = len(chance_R)
        everyone = params or [SamplingParams()] * requests
        round = Round([SLOTS] * requests, (), list(range(requests)), [64] * requests, everyone)
        slots = planner.slots(round)
        round, width = round.drafted(slots, slots), max(slots)
        confidence_RK = np.repeat(np.array(chance_R if told is None else [told() for _ in chance_R])[:, None], width, 1)
        survival_RK = np.cumprod(confidence_RK, 1) if width else None
        plan = planner.plan(round, survival_RK)
        assert all(0 <= n <= s for n, s in zip(plan, slots, strict=True))
        accepted = [int(np.cumprod(rng.random(n) < c).sum()) for n, c in zip(plan, chance_R, strict=True)]
        drafting = sum(s > 0 for s in slots)
        seconds = float(prices.verifying(round, sum(plan))[-1] + prices.drafting(round, width, drafting))
        planner.observe(Outcome(round, plan, accepted, seconds, survival_RK))
        expected = sum(1 + sum(c**k for k in range(1, n + 1)) for n, c in zip(plan, chance_R, strict=True))
        log.append((expected, seconds, plan, slots, accepted))
    return log


def rate(log):
    return sum(entry[0] for entry in log) / sum(entry[1] for entry in log)


def fixed_rate(length, chance):
    tokens = 1 + sum(chance**k for k in range(1, length + 1))
    return tokens / float(COST.target(1 + length) + COST.draft(1, length))


@pytest.mark.parametrize("chance", [0.05, 0.4, 0.75, 0.95])
def test_alone_it_reaches_the_best_fixed_length(chance):
    log = serve(Joint(Prices(COST)), [chance], 600)
    best = max(fixed_rate(length, chance) for length in range(SLOTS + 1))
    assert rate(log) > 0.97 * best


def test_a_hopeless_drafter_is_off_after_few_rounds_and_tried_rarely():
    log = serve(Joint(Prices(COST)), [0.0], 800)
    assert rate(log[:20]) > 0.6
    assert rate(log[20:]) > 0.98 * fixed_rate(0, 0.0)
    assert any(any(entry[3]) for entry in log[20:])


def test_a_draft_that_is_priced_far_too_high_is_tried_and_its_price_put_right():
    wrong = replace(COST, draft_seconds=tuple(tuple(s * 8 for s in row) for row in COST.draft_seconds))
    live = LiveCost(wrong)
    planner, random = Joint(Prices(live)), np.random.default_rng(0)
    drafted = []
    for _ in range(6000):
        round = Round([SLOTS], (), [0], [64], [SamplingParams()])
        (slots,) = planner.slots(round)
        plan = planner.plan(round.drafted([slots], [slots]), np.full((1, slots), 0.9).cumprod(1) if slots else None)
        draft = float(COST.draft(1, slots))
        took = float(COST.target(1 + plan[0])) + draft
        accepted = int(np.cumprod(random.random(plan[0]) < 0.9).sum())
        live.observe(StepTime(1 + plan[0], 1, 64, 0, slots > 0, slots, draft, took, accepted + 1))
        planner.observe(Outcome(round.drafted([slots], [slots]), plan, [accepted], took, None))
        drafted.append(slots > 0)
    assert not any(drafted[:100]) and np.mean(drafted[-500:]) > 0.9


def test_only_the_requests_that_are_guessed_right_draft():
    log = serve(Joint(Prices(COST)), [0.9, 0.02, 0.9, 0.02], 300)[100:]
    drafted = np.array([entry[3] for entry in log]).mean(0)
    assert min(drafted[0], drafted[2]) > 2 > 0.5 > max(drafted[1], drafted[3])


def test_a_request_that_turns_is_found_again():
    log = serve(Joint(Prices(COST)), [lambda step: 0.0 if step < 200 else 0.95, 0.9], 700)
    assert np.mean([entry[3][0] for entry in log[-100:]]) > 2


def test_a_promise_is_kept_at_the_others_cost():
    chances, slow = [0.9, 0.9, 0.9, 0.9], [SamplingParams()] * 4
    free = serve(Joint(Prices(COST)), chances, 300, slow)[150:]

    def speed(log):
        return sum(1 + entry[4][0] for entry in log) / sum(entry[1] for entry in log)

    promised = [SamplingParams(min_tokens_per_second=1.15 * speed(free)), *slow[1:]]
    kept = serve(Joint(Prices(COST)), chances, 500, promised)[250:]
    assert speed(kept) > 1.1 * speed(free)


def test_priority_gets_rows_first():
    params = [SamplingParams(priority=8.0), *[SamplingParams()] * 3]
    plans = np.array([entry[2] for entry in serve(Joint(Prices(COST)), [0.7] * 4, 150, params)[50:]])
    assert plans[:, 0].mean() > plans[:, 1:].mean() + 0.5


@settings(max_examples=50)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    st.lists(st.floats(0.0, 0.6), min_size=5, max_size=5),
    st.floats(0.2, 3.0),
    st.integers(0, 4),
)
def test_the_bounds_for_one_request_are_the_walk(confidence, rises, price, limit):
    cost = StepCost.of_table((1.0 + np.cumsum([0.0, *rises])).tolist())
    planner = Joint(Prices(cost))
    planner.choice.rate = price
    a_RK = np.cumprod([confidence], axis=1)
    round = Round([limit], [4], [0], [8], [SamplingParams()])
    wanted = walk(a_RK, [limit], [4], planner.means.ahead(4), planner.prices.verifying(round, 4), rate=price)
    assert planner.plan(round, a_RK) == wanted


def test_what_a_plan_cut_off_is_filled_in_and_what_was_rejected_is_known():
    survival = np.array([[0.9, 0.45, 0.09], [0.8, 0.4, 0.2], [0.5, 0.5, 0.5]])
    round = Round([3, 2, 0], [3, 2, 0])
    reached, passed = Finished.of([Outcome(round, [1, 2, 0], [1, 0, 0], 1.0, survival)]).filled_in()
    np.testing.assert_allclose(passed, [[1, 0.5, 0.1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(reached, [[1, 1, 0.5], [1, 0, 0], [0, 0, 0]])


def serve_whole(planner, chance_of, steps, seed=0):
    """As an engine does that asks `takes_all`; yields before each observation whether it was so."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        round = Round([SLOTS], (), [0], [64], [SamplingParams()])
        slots = planner.slots(round)
        round, whole = round.drafted(slots, slots), planner.takes_all and slots[0] > 0
        survival_RK = np.cumprod(np.full((1, slots[0]), chance_of(step)), 1) if slots[0] and not whole else None
        plan = slots if whole else planner.plan(round, survival_RK)
        accepted = [int(np.cumprod(rng.random(plan[0]) < chance_of(step)).sum())]
        seconds = float(planner.prices.verifying(round, plan[0])[-1] + planner.prices.drafting(round, slots[0], 1))
        yield whole
        planner.observe(Outcome(round, plan, accepted, seconds, survival_RK, whole))


def test_where_rows_cost_little_the_draft_is_verified_whole_and_looked_at_now_and_then():
    """A step of a millisecond with rows of 5 µs: weighing confidences takes longer than it could win."""
    cost = StepCost(
        rows=(1, 64),
        seconds=(1e-3, 1.3e-3),
        draft_requests=(1, 8),
        draft_slots=(1, 7),
        draft_seconds=((1e-4, 2e-4), (2e-4, 4e-4)),
    )
    planner = Joint(Prices(cost))
    whole = list(serve_whole(planner, lambda step: 0.8, 3000))
    assert 0.5 < np.mean(whole[1000:]) < 1.0
    assert 0.75 < planner.acceptance.conditional(1)[0] < 0.85  # it goes on learning

    turned = list(serve_whole(planner, lambda step: 0.02, 6000))
    assert np.mean(turned[3000:]) < 0.1  # only trials are left, and what a lucky one brings


def test_where_rows_cost_much_every_draft_is_weighed():
    planner = Joint(Prices(COST))
    whole = list(serve_whole(planner, lambda step: (0.1, 0.95)[step % 2], 1000))
    assert not any(whole[200:])  # since the first look


def test_confidences_that_tell_nothing_are_not_chosen_by():
    """Sure of half of the drafts and unsure of the others, but all are accepted alike."""
    planner = Joint(Prices(COST))
    rng = np.random.default_rng(1)
    serve(planner, [0.8], 400, told=lambda: (0.2, 0.95)[int(rng.random() < 0.5)])
    assert len(planner.looks.accepted_N) and planner.looks.options(SLOTS, 0.2).max() < 0.3
    assert planner.takes_all


def test_groups_share_what_their_requests_teach():
    acceptance = Acceptance(lambda kind: [0.6])
    chat, code = SamplingParams(speculation_group="chat"), SamplingParams(speculation_group="code")
    for step in range(40):
        round = Round([2, 2], [2, 2], [2 * step, 2 * step + 1], [9, 9], [chat, code])
        acceptance.learn(Finished.of([Outcome(round, [2, 2], [0, 2], 1.0, np.full((2, 2), 0.6))]))
    new = Round([2, 2], [2, 2], [500, 501], [9, 9], [chat, code])
    worse, better = acceptance.survival(new, 2)[:, 0]
    assert worse < 0.25 and better > 0.75


def test_the_first_guess_is_the_calibrations():
    assert Acceptance(lambda kind: [0.8, 0.5]).conditional(3).tolist() == pytest.approx([0.8, 0.5, 0.5])


def test_what_one_kind_teaches_says_nothing_of_another():
    acceptance = Acceptance(lambda kind: [0.9] if kind.law == "greedy" else [0.5])
    greedy, sampled = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)
    for step in range(60):
        round = Round([2, 2], [2, 2], [2 * step, 2 * step + 1], [9, 9], [greedy, sampled])
        acceptance.learn(Finished.of([Outcome(round, [2, 2], [2, 0], 1.0, np.full((2, 2), 0.6))]))
    new = Round([2, 2], [2, 2], [500, 501], [9, 9], [greedy, sampled])
    better, worse = acceptance.survival(new, 2)[:, 0]
    assert better > 0.95 and worse < 0.15
    cold = Round([2], [2], [502], [9], [SamplingParams(temperature=0.1)])
    assert acceptance.survival(cold, 2)[0] == pytest.approx([0.5, 0.25])  # no rounds yet, and never a greedy one


def test_newcomers_draft_where_their_group_pays_without_a_new_decision():
    planner, chat, code = (
        Joint(Prices(COST)),
        SamplingParams(speculation_group="chat"),
        SamplingParams(speculation_group="code"),
    )
    serve(planner, [0.0, 0.9], 200, [chat, code])
    decided = planner.decisions
    planner.choice.until = planner._step + 10
    round = Round([SLOTS] * 2, (), [500, 501], [64] * 2, [chat, code])
    assert [n > 0 for n in planner.slots(round)] == [False, True]
    assert planner.decisions == decided


def test_a_look_lets_no_block_end_early():
    planner = Joint(Prices(COST))
    serve(planner, [0.8], 60)
    round = Round([SLOTS], [SLOTS], [0], [64], [SamplingParams()])
    assert not planner.going_on(round, np.array([1e-9]), 1)
    planner._looking = True
    assert planner.going_on(round, np.array([1e-9]), 1)
