"""A certificate passes what keeps the law and fails what peeks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "law"))

from test_engine_law import PROMPT, Peeking, Telling, drafter_of, target_of

from dspark.common.sampling_params import SamplingParams
from dspark.engine.llm import LLM
from dspark.evaluation.certify import certify, compare


@pytest.mark.parametrize(("planner", "same"), [("threshold:0.6", True), (Peeking(), False)])
def test_a_planner_that_peeks_gets_no_certificate(planner, same):
    target = target_of(5)
    engines = [LLM(target, Telling(drafter_of("dspark", target)), planner, seed=1), LLM(target, None, "none", seed=2)]
    cores = [engine.core for engine in engines]
    (made,) = certify(*cores, [PROMPT], SamplingParams(max_tokens=4), samples=800)
    assert made.passed == same and made.accepted > 0 and made.cells > 4


def test_the_bound_holds_what_it_says():
    from collections import Counter

    one, other = Counter({(0,): 600, (1,): 400}), Counter({(0,): 500, (1,): 500})
    made = compare(one, other, 1, 1e-3)
    assert not made.passed and 0.1 < made.bound < 0.2
    assert compare(one, one, 1, 1e-3).passed
