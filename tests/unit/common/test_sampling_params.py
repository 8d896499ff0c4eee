"""Bad sampling parameters are refused in one line that names the value and the way out."""

import math

import pytest

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams

BAD = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"temperature": True},
    {"top_p": 0.0},
    {"top_p": 1.01},
    {"top_k": -1},
    {"top_k": 2.5},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"presence_penalty": math.nan},
    {"frequency_penalty": math.inf},
    {"max_tokens": 0},
    {"max_tokens": 1.0},
    {"seed": -1},
    {"seed": 2**63},
    {"acceptance": "greedy"},
    {"stop": [""]},
    {"stop": [3]},
    {"stop_token_ids": [-1]},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: math.nan}},
    {"logprobs": -1},
    {"speculation": -1},
    {"speculation": "on"},
    {"speculation_group": 3},
    {"priority": 0.0},
    {"min_tokens_per_second": math.inf},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals_name_the_value_and_the_way_out(bad):
    with pytest.raises(UserError) as caught:
        SamplingParams(**bad)
    message = str(caught.value)
    (name, value), *_ = bad.items()
    shown = next(iter(value.items()))[0] if isinstance(value, dict) else value[0] if isinstance(value, list) else value
    assert message.startswith(name) and str(shown) in message and "\n" not in message
    assert "pass" in message or "leave" in message


def test_good_values_pass():
    SamplingParams(max_tokens=None, temperature=0, top_k=5, top_p=1, min_p=1, seed=2**63 - 1, logprobs=0)
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)


def test_a_seed_asks_for_the_coupled_rule():
    assert not SamplingParams().coupled
    assert SamplingParams(seed=0).coupled
    assert SamplingParams(acceptance="coupled").coupled
    assert not SamplingParams(seed=0, acceptance="rejection").coupled


def test_tokens_outside_the_vocabulary():
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocabulary(10)
    for params in (SamplingParams(logit_bias={10: 1}), SamplingParams(stop_token_ids=[10])):
        with pytest.raises(UserError, match=r"token 10 is not below .* 10 tokens"):
            params.check_vocabulary(10)
