"""The engine's planning reads a draft's confidences where somebody makes something of them, and only there."""

from types import SimpleNamespace

import pytest
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.engine.admission import Schedule
from dspark.engine.planning import Planning
from dspark.speculation.planner import Full, Threshold
from dspark.speculation.verify import Verdict

SLOTS = 3


class Unread(torch.Tensor):
    """Confidences that may not be looked at."""

    def cpu(self, *_):
        raise AssertionError("the confidences were read")


def planned(planner):
    """One round of one request through `planner`; the planning and its plan."""
    planning = Planning(planner, seed=0)
    request = SimpleNamespace(id=0, cached=5, params=SamplingParams())
    schedule = Schedule(sampled=[request], limits=[SLOTS], rows=[1])
    assert planning.slots(schedule) == SLOTS
    confidence_RK = torch.full((1, SLOTS), 0.5).as_subclass(Unread)
    token_RK, law_RKV = torch.zeros(1, SLOTS, dtype=torch.int64), torch.ones(1, SLOTS, 1)
    plan = planning.plan(schedule, Draft(token_RK, law_RKV, confidence_RK, [SLOTS]))
    planning.observe(schedule, Verdict([1], [[0, 0]], plan), 1e-3)
    return planning, plan


def test_a_plan_of_everything_leaves_them_unread_and_is_still_counted():
    planning, plan = planned(Full())
    assert plan == [SLOTS]
    assert (planning.ledger.drafting_steps, planning.ledger.verified) == (1, SLOTS)
    assert planning.ledger.expected == planning.ledger.realised == 0  # nobody knows what they promised


def test_a_plan_by_confidence_reads_them():
    with pytest.raises(AssertionError, match="were read"):
        planned(Threshold(0.2))
