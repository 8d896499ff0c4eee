"""Planners inside the engine: what drafting now and then changes, calibration and audits, opt-outs and caps."""

import numpy as np
import pytest
from engines import engine, prompts, run

from dspark.common.sampling_params import SamplingParams
from dspark.engine import planning, runner
from dspark.speculation.calibration import Calibration, Fit
from dspark.speculation.cost import StepCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import Full, parse_planner

COST = StepCost(rows=(1, 64), seconds=(1.0, 2.0), draft_requests=(1,), draft_slots=(1, 5), draft_seconds=((0.1, 0.2),))


class NowAndThen(Full):
    """Drafts in every fourth step."""

    def __init__(self):
        self.count = 0

    def slots(self, round):
        self.count += 1
        return [0 if self.count % 4 else limit for limit in round.limit_R]


@pytest.mark.parametrize("kind", ["dspark", "dflash", "draft_model", "ngram"])
@pytest.mark.parametrize("most", [128, 7])
def test_rows_taken_late_give_the_same_drafts(kind, most, monkeypatch):
    monkeypatch.setattr(runner, "MOST_DEFERRED", most)
    late, at_once = engine(kind, NowAndThen(), pages=24), engine(kind, NowAndThen(), pages=24)
    at_once.runner._later = None
    asked = prompts([5, 23, 9, 14])
    texts = [run(core, asked, max_tokens=30, temperature=0.0) for core in (late, at_once)]
    assert texts[0] == texts[1]
    assert late.statistics.accepted_at == at_once.statistics.accepted_at and late.statistics.drafted > 0


@pytest.mark.parametrize("planner", ["greedy", "lagged", "lookahead", "joint"])
@pytest.mark.parametrize("kind", ["dspark", "draft_model"])
def test_priced_planners_serve(kind, planner):
    asked = prompts([5, 17, 9, 3, 40])
    core = engine(kind, parse_planner(planner, COST))
    assert run(core, asked, max_tokens=16, temperature=0.0) == run(
        engine("none"), asked, max_tokens=16, temperature=0.0
    )
    assert core.statistics.drafted > 0


def test_requests_may_opt_out_or_cap_their_drafts():
    core = engine("dspark")
    asked = [
        SamplingParams(max_tokens=12, temperature=0, speculation="off"),
        SamplingParams(max_tokens=12, temperature=0, speculation=2),
        SamplingParams(max_tokens=12, temperature=0),
    ]
    seen = {}

    def observer(records):
        for record in records:
            seen[record.request_id] = max(seen.get(record.request_id, 0), len(record.confidence))

    core.observer = observer
    run(core, prompts([5, 6, 7]), asked)
    assert seen == {1: 2, 2: 5}


def test_audits_verify_whole_drafts_and_outcomes_move_the_calibration(monkeypatch):
    monkeypatch.setattr(planning, "AUDIT", 0.5)
    core = engine("dspark", "threshold:0.99")
    calibration = Calibration(5, {"sampled": Fit((1.0,) * 5, (0.0,) * 5, ())})
    core.planning.calibration = online = OnlineCalibration(calibration)
    run(core, prompts([5, 17, 9]), max_tokens=40, temperature=1.0)
    assert online.audited and all(record.full for record in online.audited)
    assert core.statistics.verified_at[4] > 0
    moved = np.array(online.fit("sampled").shift)
    assert moved[0] != 0 and np.isfinite(moved).all()
