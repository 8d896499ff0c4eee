"""Scores of confidences against their definitions, and which rounds may be asked."""

import pytest
import torch

from dspark.speculation.reliability import (
    RoundRecord,
    auroc,
    conditional_samples,
    expected_calibration_error,
    reliability,
    survival_samples,
)

RECORDS = [
    RoundRecord(0, (0.9, 0.8, 0.5), verified=3, accepted=3),
    RoundRecord(1, (0.7, 0.6, 0.4), verified=3, accepted=1),
    RoundRecord(0, (0.9, 0.2, 0.1), verified=2, accepted=2),  # cut by the plan
    RoundRecord(1, (0.5,), verified=1, accepted=0),  # a short draft, whole
]


def random_samples(count=500):
    generator = torch.Generator().manual_seed(0)
    probability_N = (torch.rand(count, generator=generator, dtype=torch.float64) * 50).round() / 50  # many ties
    return probability_N, (torch.rand(count, generator=generator) < probability_N**2).double()


def test_auroc_is_the_chance_of_the_right_order():
    score_N, outcome_N = random_samples()
    better = score_N[outcome_N == 1][:, None] - score_N[outcome_N == 0][None]
    expected = ((better > 0).double() + 0.5 * (better == 0).double()).mean()
    assert auroc(score_N, outcome_N) == pytest.approx(float(expected), abs=1e-12)
    assert auroc(score_N, torch.ones(500)) is None


def test_ece_by_hand_and_its_bounds():
    probability_N = torch.tensor([0.0, 0.04, 0.05, 0.99, 1.0])  # 0.05 is the bound: it belongs to the second bin
    outcome_N = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    expected = (2 * abs(0.02 - 0.5) + abs(0.05 - 0) + 2 * abs(0.995 - 1)) / 5
    assert expected_calibration_error(probability_N.double(), outcome_N) == pytest.approx(expected)
    scores = reliability(probability_N.double(), outcome_N)
    assert [one.count for one in scores.bins] == [2, 1, 2]
    assert scores.brier == pytest.approx((0.96**2 + 0.05**2 + 0.01**2) / 5)


def test_honest_probabilities_score_better_than_bold_ones():
    p_N, outcome_N = random_samples(4000)
    honest, bold = reliability(p_N**2, outcome_N), reliability(p_N, outcome_N)
    assert honest.ece < 0.05 < 0.1 < bold.ece
    assert honest.brier < bold.brier
    assert honest.auroc == pytest.approx(bold.auroc)  # the order is the same


def test_samples_are_those_with_an_outcome():
    confidence_N, accepted_N = conditional_samples(RECORDS, 1)
    assert confidence_N.tolist() == [0.8, 0.6, 0.2] and accepted_N.tolist() == [1, 0, 1]
    assert conditional_samples(RECORDS, 2)[0].tolist() == [0.5]
    survival_N, whole_N = survival_samples(RECORDS, 1)
    assert survival_N.tolist() == pytest.approx([0.72, 0.42]) and whole_N.tolist() == [1, 0]
    assert len(survival_samples(RECORDS, 0)[0]) == 3


def test_nothing_is_said_about_no_samples():
    empty = reliability(*conditional_samples([], 0))
    assert (empty.samples, empty.ece, empty.bins) == (0, None, ())
