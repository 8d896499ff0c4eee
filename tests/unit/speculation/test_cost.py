"""The price of a step: interpolation, linear terms, what is refused, and the file SGLang reads."""

import json

import numpy as np
import pytest

from dspark.common.errors import UserError
from dspark.speculation.cost import StepCost, StepTime

COST = StepCost(
    rows=(1, 4, 8),
    seconds=(1.0, 1.3, 2.1),
    per_request=0.1,
    per_context=0.01,
    per_attended=0.001,
    prefill_weight=0.5,
    draft_requests=(1, 4),
    draft_slots=(1, 7),
    draft_seconds=((0.2, 0.8), (0.5, 2.0)),
    draft_per_context=0.001,
)


def test_the_table_is_met_at_its_knots_and_between_and_past_them():
    plain = StepCost(rows=(1, 4, 8), seconds=(1.0, 1.3, 2.1))
    np.testing.assert_allclose(plain.target([0, 1, 2, 4, 6, 8, 12]), [1.0, 1.0, 1.1, 1.3, 1.7, 2.1, 2.9])


def test_a_staircase_is_a_table_with_every_row():
    stairs = StepCost.of_table([1.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(stairs.table(4), [1.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(stairs.steps_per_second(4), [1.0, 1.0, 0.5, 0.5])


def test_requests_context_and_prefill_add_up():
    # 4 rows and 8 prefill rows worth half of one each = 8 rows; 2 requests with 10 tokens each in their pages
    assert COST.target(4, requests=2, context=20, prefill=8) == pytest.approx(2.1 + 0.2 + 0.2 + 0.001 * 8 * 10)


def test_drafting_is_bilinear_and_free_without_requests_or_slots():
    np.testing.assert_allclose(COST.draft([0, 1, 1, 4, 4, 2], [7, 0, 7, 1, 7, 4]), [0, 0, 0.8, 0.5, 2.0, 0.75])
    np.testing.assert_allclose(COST.draft(7, [1, 7], context=100), [0.8 + 0.1, 3.2 + 0.1])
    assert StepCost.of_table([1.0]).draft(3, 3) == 0


def test_prices_come_in_the_shape_that_was_asked_for():
    assert COST.target(np.ones((2, 3)), requests=np.ones((2, 1))).shape == (2, 3)
    assert COST.draft(np.arange(3)[:, None], np.arange(4)).shape == (3, 4)
    assert float(StepCost.of_table([2.0]).target(9)) == 2.0


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 20])
@pytest.mark.parametrize(("drafting", "slots"), [(0, 0), (1, 7), (2, 1), (3, 4)])
def test_one_step_is_priced_as_an_array_of_them(rows, drafting, slots):
    step = StepTime(rows, 3, 60, 5, drafting, slots, 0.1, 1.0)
    target, draft = COST.of_step(step)
    assert target == pytest.approx(float(COST.target(rows, requests=3, context=60, prefill=5)))
    assert draft == pytest.approx(float(COST.draft(drafting, slots, context=60 * drafting / 3)))


def test_json_gives_the_same_cost_back():
    assert StepCost.of_dict(json.loads(json.dumps(COST.as_dict()))) == COST


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seconds": [1.0, 0.9, 2.0]}, "never fall"),
        ({"seconds": [1.0, float("nan"), 2.0]}, "above 0"),
        ({"rows": [1, 4]}, "one for each of 3"),
        ({"rows": [4, 1, 8]}, "must rise"),
        ({"per_context": -1.0}, "per_context -1.0"),
        ({"draft_seconds": [[0.2, 0.8], [0.1, 2.0]]}, "draft_seconds"),
        ({"rows": "1"}, "rows"),
        ({"wrong": 1}, "no step cost"),
    ],
)
def test_a_damaged_cost_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        StepCost.of_dict(COST.as_dict() | change, "file.json")


def test_a_flat_table_is_inert():
    assert StepCost.of_table([1.0, 1.01, 1.02]).inert
    assert not COST.inert


def test_sglang_reads_the_table(tmp_path):
    COST.save_sps(tmp_path / "sps.json", most=7)
    table = json.loads((tmp_path / "sps.json").read_text())
    assert table["sample_batch_tokens"] == [1, 4] and table["max_batch_tokens"] == 7
    np.testing.assert_allclose(table["sample_steps_per_sec"], [1 / 1.1, 1 / 1.4])
