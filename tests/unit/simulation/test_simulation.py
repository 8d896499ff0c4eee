"""The simulator against queues whose answer is known, and goals nobody can reach."""

import json

import numpy as np
import pytest

from dspark.common.errors import UserError
from dspark.engine.config import EngineConfig
from dspark.simulation.arrivals import poisson
from dspark.simulation.capacity import Capacity, Goal, Point, highest_rate, measure_capacity, stationary
from dspark.simulation.fleet import simulate_fleet
from dspark.simulation.replica import Replica, Sizes, closed_loop, open_loop
from dspark.speculation.cost import StepCost
from dspark.speculation.round_trace import RoundTrace

FLAT = StepCost.of_table([0.01, 0.01])
NEVER = RoundTrace.of(3, {"code": [((0.5, 0.5, 0.5), 0)]})
ALWAYS = RoundTrace.of(3, {"code": [((1.0, 1.0, 1.0), 3)]})
ONE = EngineConfig(pages=64, prefix_caching=False, max_running=1)


def replica(trace=NEVER, planner="none", cost=FLAT, config=None):
    return Replica(cost, trace, planner, config=config, planning_time=False)


def test_one_server_with_constant_service_waits_as_m_d_1_does():
    service, load = 3 * 0.01, 0.7  # the prompt's step and two more
    arrivals = poisson(load / service, 4000 * service / load, np.random.default_rng(0))
    served = open_loop(replica(config=ONE), Sizes((1, 1), (3, 3)), iter(arrivals)).served
    assert len(served) == len(arrivals)
    waits = [one.first - one.arrived - 0.01 for one in served]
    assert np.mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.15)
    assert all(one.speed == pytest.approx(100) for one in served)


@pytest.mark.parametrize(
    ("trace", "planner", "tokens"), [(NEVER, "none", 1), (NEVER, "fixed:3", 1), (ALWAYS, "full", 4)]
)
def test_a_closed_loop_commits_what_the_trace_accepts(trace, planner, tokens):
    found = closed_loop(replica(trace, planner), Sizes((1, 1), (41, 41)), users=4, requests=40)
    assert found.throughput == pytest.approx(4 * tokens / 0.01, rel=0.15)
    assert all(one.speed == pytest.approx(tokens / 0.01, rel=0.02) for one in found.served)
    assert found.budget == pytest.approx({"none": 1, "fixed:3": 4, "full": 4}[planner], abs=0.3)


def test_a_trace_knows_the_acceptance_of_its_slots():
    trace = RoundTrace.of(2, {"a": [((0.5, 0.5), 2), ((0.5, 0.5), 0)], "b": [((0.5, 0.5), 1), ((0.5, 0.5), 1)]})
    assert trace.acceptance == [3 / 4, 1 / 3]
    assert replica(trace, "joint").planning.planner.acceptance.conditional(2).tolist() == pytest.approx([3 / 4, 1 / 3])


def test_pages_bound_what_runs_at_once():
    small = EngineConfig(pages=6, page_size=16, prefix_caching=False)
    many = replica(config=small)
    for _ in range(6):
        many.add("code", 20, 10)
    running = []
    while not many.idle:
        many.step()
        running.append(len(many.admission.running))
    assert max(running) == 2  # two pages for each, and a spare one


def test_the_planner_is_the_engines_own():
    dear = StepCost.of_table([0.01 * rows for rows in range(1, 200)])
    assert closed_loop(replica(NEVER, "greedy", dear), Sizes((1, 1), (20, 20)), 4, 20).budget == 1
    assert closed_loop(replica(ALWAYS, "greedy", FLAT), Sizes((1, 1), (20, 20)), 4, 20).budget > 3


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("dspark.simulation.fleet.MOST_STEPS", 8000)


def single(rate=10.0, new=50.0):
    """A replica that serves one at a time, `rate` requests a second."""
    return Capacity("none", (Point(1, rate * new, 500.0, 400.0, 0.01, 0.02, 1.0),), new)


def test_a_replica_in_the_long_run_is_m_m_1():
    load = stationary(single(), 7.0)
    assert load.running == pytest.approx(0.7 / 0.3, rel=1e-3)
    # an arrival waits for those before it: exponential with mean 1 / (μ - λ), given that it waits at all
    assert load.first_token == pytest.approx(0.02 + np.log(0.7 / 0.05) / 3.0, abs=0.11)
    assert stationary(single(), 11.0) is None


@pytest.mark.parametrize("stretch", [50.0, 50_000.0])
def test_a_fleet_is_as_many_queues(stretch):
    day = simulate_fleet(single(), np.full(4, 7.0 * 100), stretch, replicas=100, balanced=False)
    assert day.running_B[1:].mean() == pytest.approx(0.7 / 0.3, rel=0.2)
    assert day.served + day.left == pytest.approx(700 * 4 * stretch, rel=1e-6)
    best = simulate_fleet(single(), np.full(4, 7.0 * 100), stretch, replicas=100)
    assert best.first_token_p95 < 0.5 * day.first_token_p95, "a router that knows the queues is better than chance"


@pytest.mark.parametrize("stretch", [30.0, 3000.0])
def test_a_fleet_that_cannot_keep_up_queues_and_recovers(stretch):
    rates = np.array([5.0, 20.0, 1.0, 1.0, 1.0]) * 20
    day = simulate_fleet(single(), rates, stretch, replicas=20)
    assert day.waiting_B[1] == pytest.approx(10 * stretch / 2, rel=0.15)  # grows by μ - λ = 10 a second
    assert day.waiting_B[4] < 0.1 * day.waiting_B[1] and day.left < 0.01 * day.served
    assert day.speed_p5 == 400.0 and day.first_token_p95 > 1.0


def test_the_highest_rate_keeps_the_promise_and_a_little_more_breaks_it():
    points = tuple(
        Point(n, 1000.0 * n / (1 + n / 8), 1000 / (1 + n / 8), 900 / (1 + n / 8), 0.01, 0.02, 1.0)
        for n in (1, 2, 4, 8, 16)
    )
    capacity, goal = Capacity("none", points, 50.0), Goal(speed=500.0, first_token=0.1)
    best = highest_rate(capacity, goal)
    assert best.meets(goal)
    more = stationary(capacity, best.rate * 1.02)
    assert more is None or not more.meets(goal)


@pytest.mark.parametrize(
    ("goal", "says"),
    [(Goal(speed=401.0), "impossible with none: a request alone on a replica gets 400"),
     (Goal(first_token=0.019), "within 19 ms is impossible with none: a request alone on a replica waits 20 ms")],
)  # fmt: skip
def test_an_impossible_goal_is_said_with_the_best_there_is(goal, says):
    with pytest.raises(UserError, match=says):
        highest_rate(single(), goal)


def test_capacity_grows_with_users():
    capacity = measure_capacity(FLAT, NEVER, "none", Sizes((1, 1), (10, 10)), (1, 4))
    assert capacity.at("throughput", np.array([1.0, 4.0])) == pytest.approx([100, 400], rel=0.25)
    assert capacity.completions(np.array([0.0, 4.0, 400.0])) == pytest.approx([0, 40, 40], rel=0.25)


def test_a_trace_of_rounds_comes_back_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "rounds.json"
    ALWAYS.save(path)
    again = RoundTrace.load(path)
    assert again.block == 3 and again.accepted["code"].tolist() == [3]
    held = json.loads(path.read_text())
    for change, says in [
        ({"kinds": {"code": {"confidence": [[1, 1, 1]], "accepted": [4]}}}, "more than 3"),
        ({"kinds": {"code": {"confidence": [[1, 2, 1]], "accepted": [1]}}}, "outside 0 to 1"),
        ({"kinds": {"code": {"confidence": [[1, 1]], "accepted": [1]}}}, "damaged"),
        ({"kinds": {"code": {"confidence": []}}}, "damaged"),
        ({"kinds": {}}, "no trace"),
        ({"format": 0}, "no trace"),
    ]:
        path.write_text(json.dumps(held | change))
        with pytest.raises(UserError, match=says):
            RoundTrace.load(path)
