"""Plans stay within their limits, thresholds cut at the first low confidence, names are parsed or refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.common.errors import UserError
from dspark.speculation.planner import Fixed, Full, Threshold, parse_planner
from dspark.speculation.round import Round
from dspark.speculation.survival import expected_tokens, survival

CONFIDENCE = torch.tensor([[0.9, 0.5, 0.49, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9, 0.8, 0.7, 0.6]])


def test_plans():
    a = survival(CONFIDENCE)
    assert parse_planner("none").plan(Round([4, 4, 4]), a) == [0, 0, 0]
    assert parse_planner("full").plan(Round([4, 2, 0]), a) == [4, 2, 0]
    assert parse_planner("fixed:3").plan(Round([4, 2, 0]), a) == [3, 2, 0]
    assert parse_planner("threshold:0.5").plan(Round([4, 4, 4]), a) == [2, 0, 4]
    assert parse_planner("threshold:0.5").plan(Round([1, 4, 3]), a) == [1, 0, 3]
    assert parse_planner("threshold:0").plan(Round([4, 4, 4]), a) == [4, 4, 4]
    assert parse_planner("threshold:0.5").plan(Round([0, 0]), None) == [0, 0]


def test_slots_before_drafting():
    assert parse_planner("none").slots(Round([7, 3])) == [0, 0]
    assert Fixed(4).slots(Round([7, 3])) == [4, 3]
    assert Full().slots(Round([7, 3])) == Threshold(0.5).slots(Round([7, 3])) == [7, 3]


confidences = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


@given(confidences, st.floats(0, 1), st.integers(0, 8))
def test_threshold_is_the_longest_prefix_of_high_confidences(confidence, bound, limit):
    limit = min(limit, len(confidence))
    plan = Threshold(bound).plan(Round([limit]), survival(torch.tensor([confidence], dtype=torch.float64)))[0]
    near = any(abs(c - bound) < 2e-6 for c in confidence)
    wanted = next((k for k, c in enumerate(confidence[:limit]) if c < bound), limit)
    assert near or plan == wanted


def test_a_confidence_equal_to_the_bound_passes_in_float32():
    confidence = torch.tensor([[0.7, 0.3, 0.6] * 3])
    assert Threshold(0.3).plan(Round([9]), survival(confidence)) == [9]


def test_threshold_stops_at_what_is_not_a_number():
    assert Threshold(0.5).plan(Round([3]), survival(torch.tensor([[0.9, torch.nan, 0.9]]))) == [1]


@pytest.mark.parametrize(
    "text",
    ["", "fast", "fixed", "fixed:", "fixed:-1", "fixed:x", "full:3", "threshold", "threshold:1.5", "threshold:nan"],
)
def test_refusals(text):
    with pytest.raises(UserError) as caught:
        parse_planner(text)
    assert "\n" not in str(caught.value) and "planner" in str(caught.value)


def test_expected_tokens():
    a = survival(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert expected_tokens(a, [2, 1]).tolist() == [1.75, 2.0]
    assert expected_tokens(a, [0, 0]).tolist() == [1.0, 1.0]
