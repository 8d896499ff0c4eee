"""Two requests under one planner keep the target's joint law, exactly; a planner that peeks does not.

The branches hold everything: confidences that tell of the tokens before them, drafts that were never verified, what the
planner learnt in the first round, a drafter that stops early where its confidence is low.
"""

import numpy as np
import pytest
from two_requests import CLIFF, STAIRS, CoupledPair, Ending, Pair, Telling, distance, plain_law

from dspark.speculation import guard, joint, trials
from dspark.speculation.joint import Joint
from dspark.speculation.planner import parse_planner
from dspark.speculation.prices import Prices
from dspark.speculation.scheduled import Lagged


class GlobalArgmax:
    """Appendix A's planner for a whole batch: the best of all plans, looking at every confidence."""

    def slots(self, round):
        return list(round.limit_R)

    def plan(self, round, survival_RK):
        def rate(plan):
            tokens = len(plan) + sum(float(survival_RK[r, :n].sum()) for r, n in enumerate(plan))
            return tokens / float(CLIFF.target(len(plan) + sum(plan)))

        return list(max(np.ndindex(*(limit + 1 for limit in round.limit_R)), key=rate))

    def observe(self, outcome):
        pass


PLANNERS = {
    **{name: (lambda cost, name=name: parse_planner(name, cost)) for name in ("none", "full", "fixed:1")},
    **{name: (lambda cost, name=name: parse_planner(name, cost)) for name in ("threshold:0.6", "greedy", "lookahead")},
    "lagged": lambda cost: Lagged(Prices(cost), lag=1),
    "joint": lambda cost: Joint(Prices(cost)),
}


@pytest.fixture(autouse=True)
def drafting_from_the_first_round(monkeypatch):
    """The guard's first look at plain steps would be all that these short texts see."""
    monkeypatch.setattr(guard, "PLAIN", 0)


@pytest.mark.parametrize(("cost", "stops_below"), [(STAIRS, 0.0), (CLIFF, 0.5)], ids=["stairs", "cliff"])
@pytest.mark.parametrize("rule", [Pair, CoupledPair])
@pytest.mark.parametrize("name", PLANNERS)
def test_the_joint_law_is_the_targets(name, rule, cost, stops_below, monkeypatch):
    monkeypatch.setattr(joint, "KEEP", 1)  # decide anew in every step, and explore
    monkeypatch.setattr(trials, "EXPLORE", 10.0)
    system = rule(PLANNERS[name](cost), drafter=Telling(stops_below))
    assert distance(system.law(), plain_law()) < 1e-12


@pytest.mark.parametrize(("name", "length"), [("full", 2), ("lookahead", 2), ("joint", 1)])
def test_so_it_is_where_the_planner_ends_the_block(name, length):
    system = Pair(Ending(PLANNERS[name](STAIRS), below=1.0), slots=3, length=length)
    assert distance(system.law(), plain_law(length)) < 1e-12


def test_a_ranking_over_all_slots_must_not_end_blocks():
    """Whether a later slot of one request exists tells of the other's token, and where it ranks decides about that."""
    system = Pair(Ending(PLANNERS["greedy"](STAIRS), below=1.0), slots=3, length=1)
    assert distance(system.law(), plain_law(1)) > 1e-3


@pytest.mark.parametrize("stops_below", [0.0, 0.5])
def test_a_planner_that_peeks_fails(stops_below):
    assert distance(Pair(GlobalArgmax(), drafter=Telling(stops_below)).law(), plain_law()) > 1e-3


def test_the_coupled_rule_forgives_even_that():
    assert distance(CoupledPair(GlobalArgmax()).law(), plain_law()) < 1e-12
