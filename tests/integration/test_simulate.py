"""The simulator beside a real engine whose steps are priced alike; the command and its refusals."""

import json

import pytest
from engines import VOCABULARY, engine, prompts

from dspark.cli.main import main
from dspark.engine.profile import Profile
from dspark.evaluation.load import Driver, record_rounds
from dspark.evaluation.workload import Workload
from dspark.simulation.replica import Replica, Sizes, closed_loop
from dspark.speculation.cost import StepCost
from dspark.speculation.guard import Guard
from dspark.speculation.planner import parse_planner

WORK = Workload(prompts((40, 50)), VOCABULARY, (8, 16), (16, 32))
SIZES = Sizes((8, 16), (16, 32))
COST = StepCost(
    rows=(1, 8, 64),
    seconds=(1e-3, 1.4e-3, 6e-3),
    per_request=2e-5,
    per_context=1e-6,
    draft_requests=(1, 8),
    draft_slots=(1, 4),
    draft_seconds=((3e-4, 5e-4), (8e-4, 2e-3)),
)


@pytest.fixture(scope="module")
def recorded():
    core = engine("draft_model", pages=400)
    return record_rounds(Driver(core), WORK, rounds=300)


@pytest.mark.parametrize("planner", ["none", "fixed:2", "greedy"])
def test_a_replica_does_what_the_engine_does(recorded, planner, monkeypatch):
    monkeypatch.setattr(Guard, "allows", lambda self, requests: True)  # the engine's own seconds are not these prices
    users, served = 4, 40
    core = engine("draft_model", parse_planner(planner, COST), pages=400, prefix_caching=False)
    seconds = []
    core.meter = lambda step: seconds.append(sum(COST.of_step(step)))
    driver, stream = Driver(core), WORK.stream()
    for _ in range(users):
        driver.add(next(stream))
    while len(driver.finished) < served:
        for commit in driver.step():
            if commit.finish_reason:
                driver.add(next(stream))
    throughput = sum(driver.committed.values()) / sum(seconds)
    simulated = closed_loop(Replica(COST, recorded, planner, planning_time=False), SIZES, users, served)
    assert simulated.throughput == pytest.approx(throughput, rel=0.1)
    counts = [one.statistics for one in driver.finished]
    budget = 1 + sum(one.verified for one in counts) / sum(one.rounds for one in counts)
    assert simulated.budget == pytest.approx(budget, rel=0.1)


@pytest.fixture
def files(recorded, tmp_path):
    Profile(COST, {"machine": "a fast one"}).save(tmp_path / "profile.json")
    recorded.save(tmp_path / "rounds.json")
    row = {"users": 2, "policy": "none", "throughput": 1000.0, "user_speed": 500.0, "budget": 1.0}
    load = {"settings": {"workload": {"prompt_tokens": [8, 16], "new_tokens": [16, 32]}}, "rows": [row]}
    (tmp_path / "load.json").write_text(json.dumps(load))
    return tmp_path


def simulate(files, *options):
    lengths = ["--prompt-tokens", "8:16", "--new-tokens", "16:32", "--bins", 6]
    given = ["simulate", "--profile", files / "profile.json", "--trace", files / "rounds.json", *lengths, *options]
    return main([str(option) for option in given])


def test_the_command(files, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("dspark.simulation.report.USERS", (1, 4, 8))
    monkeypatch.setattr("dspark.simulation.fleet.MOST_STEPS", 600)
    options = ["--policies", "none,greedy", "--peak", 2000, "--speed", 100, "--price", 2]
    assert simulate(files, *options, "--validate", files / "load.json", "--out", files / "plan") == 0
    assert "Fleet plan" in capsys.readouterr().out
    plan = json.loads((files / "plan" / "simulation.json").read_text())
    assert [one["policy"] for one in plan["policies"]] == ["none", "greedy"]
    for one in plan["policies"]:
        assert one["goal_kept"] and one["replicas"] == one["replicas_needed"] > 1
        assert one["cost_per_million_of_the_day"] >= one["cost_per_million_at_goal"] > 0
    assert plan["validation"]["rows"][0]["throughput"] == 1000.0
    assert {path.name for path in (files / "plan").iterdir()} == {
        "simulation.md", "simulation.json", "frontier.png", "day.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--peak", "0"], "--peak 0 is not above 0"),
        (["--peak", "9", "--speed", "1e9"], "is impossible with none: a request alone on a replica gets"),
        (["--peak", "9", "--first-token-ms", "0.001"], "a first token within 0.001 ms is impossible"),
        (["--peak", "9", "--arrivals", "nowhere.csv"], "cannot read nowhere.csv"),
        (["--peak", "9", "--policies", "best"], "planner 'best' is unknown"),
        (["--peak", "9", "--trace", "nowhere.json"], "cannot read nowhere.json"),
        (["--peak", "9", "--profile", "nowhere.json"], "cannot read nowhere.json"),
        (["--peak", "9", "--validate", "nowhere.json"], "no result of dspark bench load"),
    ],
)
def test_bad_input(files, capsys, monkeypatch, options, says):
    monkeypatch.setattr("dspark.simulation.report.USERS", (1, 2))
    monkeypatch.setattr("dspark.simulation.fleet.MOST_STEPS", 100)
    assert simulate(files, "--policies", "none", *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
