"""A standing choice is followed without a question, while it stands; the planner hears of its steps together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.engine.admission import Schedule
from dspark.engine.following import Following, round_of
from dspark.engine.planning import Planning
from dspark.engine.rest import Rest
from dspark.speculation.choice import Choice
from dspark.speculation.circles import circle_of
from dspark.speculation.cost import StepCost
from dspark.speculation.guard import size_of
from dspark.speculation.joint import Joint
from dspark.speculation.planner import Full
from dspark.speculation.prices import Prices
from dspark.speculation.round import Round
from dspark.speculation.verify import Verdict

GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)


def schedule_of(*requests, limit=7):
    """A step of requests given as (number, parameters)."""
    sampled = [SimpleNamespace(id=number, cached=9, params=params) for number, params in requests]
    return Schedule(sampled=sampled, limits=[limit] * len(sampled), rows=[1] * len(sampled))


def test_it_holds_for_its_steps_its_size_and_whom_it_knows():
    following = Following()
    assert not following.holds(schedule_of((1, GREEDY)))
    choice = Choice(size_of(2), slots={1: 3, 2: 0}, newcomers={circle_of(GREEDY): 5})
    following.take((choice, 3))
    step = schedule_of((2, GREEDY), (1, GREEDY))
    assert following.holds(step)
    assert [request.id for request in step.sampled] == [1, 2] and step.limits == [3, 0]  # those that draft in front
    assert not following.holds(schedule_of((1, GREEDY)))  # another size
    assert not following.holds(schedule_of((1, GREEDY), (3, SAMPLED)))  # nobody knows what that one should do
    step = schedule_of((1, GREEDY), (4, GREEDY), limit=4)
    assert following.holds(step) and step.limits == [3, 4]  # one of a known circle, within what fits
    assert following.holds(step) and not following.holds(step)  # three steps


def test_the_report_is_the_steps_since_the_last():
    following = Following()
    following.take((Choice(size_of(1), slots={1: 3}), 9))
    for accepted, seconds in ((2, 0.5), (0, 0.25)):
        step = schedule_of((1, GREEDY))
        assert following.holds(step)
        following.observe(step, [3], [accepted], seconds)
    found = following.report()
    assert (found.steps, found.seconds, found.requests) == (2, 0.75, 1)
    assert (found.finished.plan, found.finished.accepted) == ([3, 3], [2, 0])
    assert [outcome.seconds for outcome in found.last] == [0.5, 0.25] and all(o.unread for o in found.last)
    assert following.report() is None


def test_a_rest_goes_on_with_younger_requests_that_do_not_draft():
    round = round_of(schedule_of((1, GREEDY), (2, GREEDY)))
    choice = Choice(size_of(2), slots={1: 0, 2: 0}, newcomers={circle_of(GREEDY): 0, circle_of(SAMPLED): 3})
    rest = Rest.of(9, round, choice)
    assert rest.holds(schedule_of((2, GREEDY), (3, GREEDY)))
    assert not rest.holds(schedule_of((3, GREEDY), (4, SAMPLED)))  # one that drafts
    choice.newcomers.pop(circle_of(SAMPLED))
    assert not rest.holds(schedule_of((3, GREEDY), (5, SAMPLED)))  # one nobody knows
    assert not Rest.of(9, round).holds(schedule_of((2, GREEDY), (3, GREEDY)))


class Counted(Joint):
    """Counts how often it is asked."""

    asked = 0

    def slots(self, round):
        self.asked += 1
        return super().slots(round)


COST = StepCost(
    rows=(1, 64), seconds=(1e-3, 1.3e-3), draft_requests=(1, 8), draft_slots=(1, 7), draft_seconds=((1e-4, 2e-4),) * 2
)


def run(planning, steps, chance, seed=0):
    """Steps of one greedy request; its slots in each."""
    rng, taken = np.random.default_rng(seed), []
    for _ in range(steps):
        step = schedule_of((1, GREEDY))
        slots = planning.slots(step)
        none = torch.empty(0)
        draft = Draft(none, none, torch.full((1, slots), chance), [slots]) if slots else None
        plan = planning.plan(step, draft)
        accepted = int(np.cumprod(rng.random(plan[0]) < chance).sum())
        taken.append(slots)
        seconds = float(COST.target(1 + plan[0]) + COST.draft(1 if slots else 0, slots))
        planning.observe(step, Verdict([accepted], [], plan), seconds)
    return taken


def test_where_drafting_pays_the_planner_is_hardly_asked_and_goes_on_learning():
    planning = Planning(Counted(Prices(COST)), seed=0)
    run(planning, 1000, 0.9)
    asked = planning.planner.asked
    taken = run(planning, 2000, 0.9)
    assert planning.planner.asked - asked < 0.1 * 2000
    assert np.mean(taken) > 5
    round = Round([7], request_ids=[1], params_R=[GREEDY])
    assert planning.planner.acceptance.survival(round, 1)[0, 0] == pytest.approx(0.9, abs=0.05)


def test_a_drafter_that_turns_bad_is_found_though_nobody_asks():
    planning = Planning(Counted(Prices(COST)), seed=0)
    run(planning, 2000, 0.9)
    assert np.mean(run(planning, 4000, 0.02)[2000:]) < 0.3


def test_a_new_planner_owes_nothing_to_what_the_last_one_said():
    planning = Planning(Counted(Prices(COST)), seed=0)
    run(planning, 1000, 0.9)
    planning.planner = Full()
    assert run(planning, 20, 0.9) == [7] * 20
