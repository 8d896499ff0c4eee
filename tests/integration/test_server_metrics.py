"""Every metric is in the guide and every one there is exported; planning's counts agree with each other."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving, tiny_core

from dspark.engine.pricing import METERING
from dspark.server.service import ServerConfig
from dspark.speculation.calibration import Calibration
from dspark.speculation.cost import StepCost
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import parse_planner

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "metrics.md"
PIECES = ("_bucket", "_count", "_sum")


def planning(core, name):
    """A planner with a price made up so that drafting pays or does not; measuring one would take seconds."""
    cheap = StepCost.of_table([1.0, 1.0001], draft_requests=(1,), draft_slots=(1,), draft_seconds=((0.0001,),))
    dear = StepCost.of_table([1.0, 9.0], draft_requests=(1,), draft_slots=(1,), draft_seconds=((9.0,),))
    core.planning.live = live = LiveCost({"cheap": cheap, "dear": dear}[name])
    core.planning.planner = parse_planner("joint", live)
    core.planning.calibration = OnlineCalibration(Calibration(core.drafter.block_size, {}))
    core.meter, core.metering = live.observe, 100 * METERING
    return core


@pytest.fixture(scope="module")
def cheap(tiny_pair):
    with serving(planning(tiny_core(tiny_pair), "cheap"), ServerConfig(name="tiny")) as running:
        for _ in range(6):
            asked = {"model": "tiny", "prompt": ["def add(a, b):"] * 4, "temperature": 0, "max_tokens": 60}
            running.openai.completions.create(**asked, extra_body={"ignore_eos": True})
        assert running.http.get("/nowhere").status_code == 404
        yield running


def read(running):
    families = text_string_to_metric_families(running.http.get("/metrics").text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def test_the_guide_lists_every_metric_and_no_other(cheap):
    listed = set(re.findall(r"^\| `(dspark_\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.M))
    told = {name for name, *_ in read(cheap) if name.startswith("dspark_") and not name.endswith("_created")}
    bare = {next((name.removesuffix(end) for end in PIECES if name.endswith(end)), name) for name in told}
    assert bare == listed


def test_labels_are_bounded(cheap):
    labels = {key for _, *labels in read(cheap) for key, _ in labels}
    assert labels <= {"endpoint", "status", "finished_reason", "position", "state", "planner", "le"}
    endpoints = {dict(labels)["endpoint"] for _, *labels in read(cheap) if "endpoint" in dict(labels)}
    assert "other" in endpoints and "/nowhere" not in endpoints


def test_counts_of_planning_agree(cheap):
    now = read(cheap)
    spec = {name: value for (name, *labels), value in now.items() if not labels}
    drafted = spec["dspark_spec_decode_num_draft_tokens_total"]
    verified, accepted = (spec[f"dspark_spec_decode_num_{what}_tokens_total"] for what in ("verified", "accepted"))
    assert drafted > 0 and verified == spec["dspark_spec_decode_verify_budget_tokens_sum"]
    steps = now["dspark_spec_decode_steps_total", ("state", "drafting")]
    assert steps == spec["dspark_spec_decode_verify_budget_tokens_count"] > 0
    assert now["dspark_spec_decode_verify_budget_tokens_bucket", ("le", "+Inf")] == steps
    assert spec["dspark_spec_decode_realised_accepted_tokens_total"] == accepted
    assert 0 < spec["dspark_spec_decode_expected_accepted_tokens_total"] <= verified
    rows = spec["dspark_spec_decode_num_drafts_total"] + verified
    wasted = rows - spec["dspark_spec_decode_num_committed_tokens_total"]
    assert spec["dspark_spec_decode_num_wasted_rows_total"] == wasted >= 0
    assert 0 < spec["dspark_engine_measured_step_seconds_total"] <= spec["dspark_engine_step_seconds_total"]
    assert 0 <= spec["dspark_spec_decode_calibration_error"] <= 1
    assert spec["dspark_spec_decode_audited_rounds_total"] > 0
    assert spec["dspark_event_loop_lag_seconds_count"] > 0 and spec["dspark_spec_decode_resting"] in (0, 1)


def test_a_planner_that_lets_nobody_draft_rests(tiny_pair):
    with serving(planning(tiny_core(tiny_pair), "dear"), ServerConfig(name="tiny")) as running:
        running.openai.completions.create(model="tiny", prompt="def add", temperature=0, max_tokens=60)
        now = read(running)
        assert now["dspark_spec_decode_steps_total", ("state", "resting")] > 10
        assert now[("dspark_spec_decode_resting",)] == 1
        assert now["dspark_planner_info", ("planner", "joint")] == 1
