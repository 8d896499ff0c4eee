"""Scores by position come from whole rounds, and the sweep cuts those rounds as the planner would."""

import pytest
import torch

from dspark.evaluation.reliability import by_position, threshold_sweep
from dspark.speculation.planner import Threshold
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.survival import survival


def records(count=200):
    generator = torch.Generator().manual_seed(0)
    confidence_RK = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    accepted_R = (torch.rand(count, 4, generator=generator) < confidence_RK).long().cumprod(1).sum(1)
    rows = zip(confidence_RK.tolist(), accepted_R.tolist(), strict=True)
    return [RoundRecord(0, tuple(c), 4, n) for c, n in rows], confidence_RK


def test_rounds_that_were_cut_do_not_count():
    whole, _ = records(20)
    cut = [RoundRecord(0, (0.9, 0.1, 0.1, 0.1), verified=1, accepted=1)] * 50
    assert by_position([*whole, *cut]) == by_position(whole)
    assert [scores["samples"] for scores in by_position(whole)["survival"]] == [20] * 4
    assert by_position([]) == {"conditional": [], "survival": []}


@pytest.mark.parametrize("index", [0, 7, 12])
def test_a_threshold_cuts_as_the_planner_does(index):
    found, confidence_RK = records()
    point = threshold_sweep(found)[index]
    planner = Threshold(point["threshold"])
    lengths = [planner._prefix(row, 4) for row in survival(confidence_RK).tolist()]
    accepted = [min(n, record.accepted) for n, record in zip(lengths, found, strict=True)]
    assert point["verified"] == pytest.approx(sum(lengths) / 200)
    assert point["tau"] == pytest.approx(1 + sum(accepted) / 200)
    assert point["acceptance_rate"] == pytest.approx(sum(accepted) / sum(lengths))


def test_a_sweep_trades_tokens_for_acceptance():
    points = threshold_sweep(records()[0])
    assert [p["threshold"] for p in points] == sorted(p["threshold"] for p in points)
    taus = [p["tau"] for p in points]
    assert taus == sorted(taus, reverse=True) and points[15]["acceptance_rate"] > points[0]["acceptance_rate"] + 0.3
    assert threshold_sweep([]) == []


def test_rounds_without_a_draft_are_a_token_each():
    found = records()[0]
    alone, diluted = threshold_sweep(found)[3], threshold_sweep(found, undrafted=200)[3]
    assert diluted["tau"] - 1 == pytest.approx((alone["tau"] - 1) / 2)
    assert diluted["acceptance_rate"] == alone["acceptance_rate"]
