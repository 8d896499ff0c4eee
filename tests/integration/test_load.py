"""Load on a tiny engine: what is counted, that policies meet the same work, and what is refused."""

import json
from itertools import islice

import pytest
from engines import VOCABULARY, drain, engine, plain, prompts

from dspark.cli.main import main
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.evaluation.load import Driver, Policy, closed_loop, open_loop
from dspark.evaluation.workload import CODE, NOISE, LoadRequest, Workload

WORK = Workload(prompts((30, 40)), VOCABULARY, (3, 8), (4, 10), noise=0.5)


def test_a_workload_is_the_same_every_time_and_has_its_share_of_each_kind():
    first, again, other = (list(islice(WORK.stream(n), 10)) for n in (1, 1, 2))
    assert first == again != other
    assert [request.kind for request in first] == [CODE, NOISE] * 5
    assert all(3 <= len(r.prompt) <= 8 and 4 <= r.params.max_tokens <= 10 for r in first)
    assert {r.params.speculation_group for r in first} == {CODE, NOISE}


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"prompt_tokens": (8, 3)}, "no range"), ({"noise": 1.5}, "no share"), ({"prompts": ()}, "no prompts")],
)
def test_a_workload_that_cannot_be(fields, says):
    with pytest.raises(UserError, match=says):
        Workload(**{"prompts": prompts((9,)), "vocabulary": VOCABULARY} | fields)


def test_a_closed_loop_keeps_its_users_busy_and_leaves_nothing():
    core = engine("draft_model", "full")
    seen = []
    step = core.step
    core.step = lambda: (seen.append(len(core.requests)), step())[1]
    found = closed_loop(Driver(core), WORK.users(3), seconds=0.2)
    assert set(seen) == {3} and core.idle
    core.check_integrity()
    assert found.tokens == sum(found.tokens_by_kind.values()) > 0 and found.seconds >= 0.2
    assert found.finished and all(one.tokens >= 1 and one.waited > 0 for one in found.finished)
    assert found.steps <= found.tokens


def test_an_open_loop_serves_arrivals_in_time_and_counts_what_is_left():
    core = engine()
    found = open_loop(Driver(core), WORK.stream(), [0.0, 0.01, 0.02], seconds=20.0)
    assert len(found.finished) == 3 and found.left == 0 and found.seconds < 20
    crowded = open_loop(Driver(core), WORK.stream(), [0.0] * 50, seconds=0.02)
    assert crowded.left + len(crowded.finished) == 50 and crowded.left > 0 and core.idle


def test_blinded_drafts_are_never_right_and_change_no_text():
    core = engine("draft_model", "full")
    driver = Driver(core, blind=True)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    asked = prompts((6, 9))
    for kind, prompt in zip((NOISE, CODE), asked, strict=True):
        driver.add(LoadRequest(kind, prompt, params))
    texts = {number: [] for number in driver.tokens}
    while not core.idle:
        for commit in driver.step():
            texts[commit.request_id] += commit.token_ids
    assert list(texts.values()) == [plain(prompt, 20) for prompt in asked]
    noise, code = sorted(driver.finished, key=lambda one: one.kind == CODE)
    assert noise.statistics.accepted < 0.2 * noise.statistics.verified
    assert code.statistics.accepted > 0.5 * code.statistics.verified


def test_policies_share_an_engine():
    core = engine("draft_model")
    for policy in (Policy.of(core, "none"), Policy.of(core, "full")):
        policy.enter(core)
        core.add(prompts((5,))[0], SamplingParams(max_tokens=6, ignore_eos=True))
        (commits,) = drain(core).values()
        assert (commits[-1].statistics.drafted > 0) == (policy.name == "full")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("dspark.engine.profile.cache_directory", lambda: tmp_path)
    monkeypatch.setattr("dspark.engine.profile.SECONDS", 0.1)


def test_the_command(tiny_pair, cache, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pair = ["--target", tiny_pair.target, "--drafter", tiny_pair.drafter, "--no-compile"]
    lengths = ["--prompt-tokens", "4:8", "--new-tokens", "4:8", "--rounds", 1, "--seconds", 0.05]
    trace = tmp_path / "trace.csv"
    trace.write_text("time\n0\n0.01\n")
    out = tmp_path / "out"
    first = ["bench", "load", *pair, *lengths, "--policies", "none,joint", "--users", "2", "--out", out]
    assert main([str(argument) for argument in first]) == 0
    second = [*first, "--users", "1", "--rates", "50", "--arrivals", trace, "--join", out / "load.json"]
    assert main([str(argument) for argument in second]) == 0
    held = json.loads((out / "load.json").read_text())
    assert sorted((row.get("users"), row["policy"]) for row in held["rows"] if "users" in row) == [
        (1, "joint"), (1, "none"), (2, "joint"), (2, "none"),
    ]  # fmt: skip
    assert sum("rate" in row for row in held["rows"]) == 2
    assert {path.name for path in out.iterdir()} == {"load.json", "profile.json", "frontier.png", "concurrency.png"}
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--users", "1,x"], "--users '1,x' is no list"),
        (["--users", "0"], "no list of whole numbers above 0"),
        (["--rates", "-1"], "--rates"),
        (["--policies", "none,fast"], "planner 'fast' is unknown"),
        (["--prompt-tokens", "9:3"], "--prompt-tokens '9:3'"),
        (["--rates", "1", "--arrivals", "nowhere.csv"], "cannot read nowhere.csv"),
        (["--noise", "2"], "noise 2.0"),
        (["--profile", "nowhere.json"], "cannot read nowhere.json"),
        (["--join", "nowhere.json"], "no result of dspark bench load"),
        (["--new-tokens", "500:600"], "exceed the context"),
    ],
)
def test_bad_input(tiny_pair, capsys, options, says):
    pair = ["--target", str(tiny_pair.target), "--drafter", str(tiny_pair.drafter), "--no-compile", "--rounds", "1"]
    assert main(["bench", "load", *pair, *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
