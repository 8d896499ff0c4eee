"""Measuring an engine's steps leaves it as it was; a profile of something else is refused."""

import json
from dataclasses import replace

import pytest
from engines import drain, engine, prompts, run

from dspark.cli.main import main
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.build import build_engine
from dspark.engine.measuring import glance
from dspark.engine.pricing import plan_with
from dspark.engine.profile import Profile, cached_profile, ensure_profile, identity, keep, measure
from dspark.speculation.cost import StepTime

SECONDS = 0.3
ROOM = {"max_running": 4, "pages": 800}


@pytest.fixture(scope="module")
def measured():
    return measure(engine("dspark", **ROOM), seconds=SECONDS)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty directory for kept profiles."""
    monkeypatch.setattr("dspark.engine.profile.cache_directory", lambda: tmp_path)
    return tmp_path


def test_a_profile_knows_rows_requests_and_drafts(measured):
    assert measured.cost.rows[0] == 1 and len(measured.cost.rows) >= 6
    assert measured.cost.draft_requests[0] == 1 and measured.cost.draft_slots[-1] == 5
    assert measured.steps >= 12


@pytest.mark.parametrize("look", [lambda core: measure(core, seconds=0.05), glance])
def test_the_engine_is_left_as_it_was(look):
    core, untouched = engine("dspark", "fixed:2", max_running=4), engine("dspark", "fixed:2", max_running=4)
    planner = core.planner
    look(core)
    core.check_integrity()
    assert core.idle and core.planner is planner and core.meter is None
    assert core.timings.steps == 0 and core.statistics.rounds == 0
    asked = prompts((5, 9))
    assert run(core, asked, temperature=1.0, max_tokens=9) == run(untouched, asked, temperature=1.0, max_tokens=9)
    assert core.timings.steps == untouched.timings.steps


@pytest.mark.parametrize("kind", ["none", "ngram", "draft_model"])
def test_any_drafter_is_measured(kind):
    cost = measure(engine(kind, **ROOM | {"max_running": 2}), seconds=0.05).cost
    assert bool(cost.draft_seconds) == (kind != "none")
    assert max(cost.rows) == (2 if kind == "none" else 2 * (1 + max(cost.draft_slots)))


def test_a_busy_engine_is_not_measured():
    core = engine()
    core.add([1, 2, 3], SamplingParams(max_tokens=2))
    for look in (measure, glance):
        with pytest.raises(UserError, match="has 1 requests"):
            look(core)
    assert drain(core)


def test_kept_profiles_are_found_again_and_damaged_ones_are_none(measured, cache):
    core = engine("dspark", **ROOM)
    assert cached_profile(core) is None
    path = keep(measured)
    assert cached_profile(core).cost == measured.cost
    assert cached_profile(engine("ngram")) is None
    path.write_text("{")
    assert cached_profile(core) is None
    assert ensure_profile(core, seconds=0.05).cost == cached_profile(core).cost


def dearer(profile, *, draft=1.0, target=1.0):
    """A profile whose every draft, and every forward, costs so many times as much."""
    cost = profile.cost
    drafts = tuple(tuple(seconds * draft for seconds in row) for row in cost.draft_seconds)
    forwards = tuple(seconds * target for seconds in cost.seconds)
    return replace(profile, cost=replace(cost, draft_seconds=drafts, seconds=forwards))


@pytest.mark.parametrize("kind", ["dspark", "ngram", "none"])
def test_a_glance_is_one_step_of_each_end(kind):
    core = engine(kind, **ROOM)
    block = core.drafter.block_size
    assert {(step.rows, step.slots, step.prefill) for step in glance(core)} == {(1, 0, 0), (1 + block, block, 0)}


@pytest.mark.parametrize("wrong", [{"draft": 10.0}, {"draft": 0.1}, {"target": 10.0}, {"target": 10.0, "draft": 10.0}])
def test_a_kept_profile_of_a_busy_machine_is_measured_anew(measured, cache, wrong):
    core = engine("dspark", **ROOM)
    bad = dearer(measured, **wrong)
    keep(bad)
    found = ensure_profile(core, seconds=0.05)
    assert found.cost == cached_profile(core).cost != bad.cost
    core.add([1, 2, 3], SamplingParams(max_tokens=2))
    keep(bad)
    assert ensure_profile(core).cost == bad.cost, "a busy engine cannot look"
    assert drain(core)


def test_a_profile_holds_what_took_about_as_long_as_it_says(measured):
    cost = measured.cost
    step = StepTime(rows=6, requests=1, context=40, prefill=0, drafting=1, slots=5, draft_seconds=0.0, seconds=0.0)
    target, draft = cost.of_step(step)
    offs = ((1.2, 0.9, True), (1.6, 1.0, False), (1.0, 1.6, False), (0.6, 1.0, False), (2.0, 2.2, True), (5, 5, False))
    for target_off, draft_off, holds in offs:
        took = replace(step, draft_seconds=draft * draft_off, seconds=target * target_off + draft * draft_off)
        assert measured.holds([took]) == holds
    assert measured.holds([])


def test_a_profile_of_fewer_requests_is_measured_anew_and_one_of_more_will_do(cache):
    small, large = engine("dspark", max_running=1, pages=800), engine("dspark", max_running=8, pages=800)
    assert ensure_profile(small, seconds=0.05).requests == 1
    assert cached_profile(large) is None
    assert max(ensure_profile(large, seconds=2.0).cost.draft_requests) == 8
    assert cached_profile(small) == cached_profile(large) and cached_profile(small).requests == 8


def test_what_differs_is_said(measured, tmp_path):
    measured.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    loaded.check(engine("dspark"))
    with pytest.raises(UserError, match=r"measured with drafter DSpark .* here it is NGram"):
        loaded.check(engine("ngram"))
    other = replace(loaded, identity=loaded.identity | {"machine": "an abacus"})
    with pytest.raises(UserError, match="machine an abacus, here it is"):
        other.check(engine("dspark"))


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not JSON"), ("[]", "no profile"), ('{"format": 9, "identity": {}}', "no profile"), (None, "cannot read")],
)
def test_a_file_that_is_no_profile(tmp_path, content, says):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says):
        Profile.load(path)


def test_a_profile_with_a_falling_table_is_refused(measured, tmp_path):
    path = tmp_path / "profile.json"
    measured.save(path)
    held = json.loads(path.read_text())
    held["cost"]["seconds"][0] = 1e9
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match="never fall"):
        Profile.load(path)


def test_the_command(tiny_pair, cache, tmp_path, capsys):
    made, sps = tmp_path / "made.json", tmp_path / "sps.json"
    options = ["--drafter", tiny_pair.drafter, "--no-compile", "--seconds", 0.5, "--max-running", 2]
    arguments = ["profile", tiny_pair.target, *options, "--output", made, "--sps", sps]
    assert main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    assert "a step without drafting" in out and "drafter: DSpark" in out
    assert set(identity(engine("dspark"))) == set(Profile.load(made).identity)
    assert len(json.loads(sps.read_text())["sample_batch_tokens"]) > 2


def test_a_planner_that_weighs_costs_gets_them_from_the_engine(measured, cache, tmp_path, tiny_pair):
    core = engine("dspark", **ROOM)
    assert plan_with(core, "fixed:2") is None and core.meter is None
    live = plan_with(core, "greedy", measured)
    core.metering = float("inf")  # every step, however short
    run(core, prompts((4, 9)), temperature=1.0, max_tokens=30)
    assert core.planner.prices.cost is live.cost is not measured.cost, "the price never moved"
    measured.save(tmp_path / "profile.json")
    with pytest.raises(UserError, match="measured with drafter DSpark"):
        plan_with(engine("ngram"), "greedy", tmp_path / "profile.json")
    with pytest.raises(UserError, match="unknown"):
        plan_with(core, "gredy")


def test_engines_are_built_with_the_profile_kept_for_them(cache, tiny_pair):
    options = {"compile": False, "max_running": 2, "pages": 100}
    core = build_engine(tiny_pair.target, tiny_pair.drafter, "greedy", **options)
    (kept,) = cache.iterdir()
    assert core.planner.prices.cost == Profile.load(kept).cost
    again = build_engine(tiny_pair.target, tiny_pair.drafter, "greedy", profile=kept, **options)
    assert again.planner.prices.cost == core.planner.prices.cost
