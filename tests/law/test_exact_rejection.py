"""Rejection rule: the first two committed tokens have the target's own joint law, exactly, in every combination."""

import pytest
from exact import System, joint_law
from tiny_world import DRAFTERS, PLANNER_NAMES, PROMPT, plain_law, target_logits

from dspark.common.sampling_params import SamplingParams
from dspark.speculation.planner import parse_planner

TRUNCATIONS = {
    "none": {},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.25},
    "all": {"top_k": 3, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.6, "logit_bias": {1: 0.5}},
}


def expected(params: SamplingParams, length: int = 2) -> dict[tuple[int, ...], float]:
    """The target's own joint law, by the chain rule over `plain_law`."""
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*output, v): before * p
            for output, before in law.items()
            for v, p in enumerate(plain_law(target_logits([*PROMPT, *output]), params, PROMPT, output))
        }
    return law


def difference(found: dict, wanted: dict) -> float:
    return max(abs(found.get(key, 0.0) - wanted.get(key, 0.0)) for key in found.keys() | wanted.keys())


@pytest.mark.parametrize("planner", PLANNER_NAMES)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_two_tokens_have_the_target_law(drafter, planner, temperature):
    for truncation in TRUNCATIONS.values():
        params = SamplingParams(temperature=temperature, **truncation)
        system = System(target_logits, DRAFTERS[drafter], parse_planner(planner), params, prompt=PROMPT)
        assert difference(joint_law(system), expected(params)) < 1e-12, truncation


@pytest.mark.parametrize(("drafter", "planner"), [("markov", "full"), ("markov", "threshold:0.6"), ("lookup", "full")])
def test_three_tokens_of_three_slots_have_the_target_law(drafter, planner):
    params = SamplingParams(temperature=0.7, frequency_penalty=0.5)
    system = System(target_logits, DRAFTERS[drafter], parse_planner(planner), params, slots=3, prompt=PROMPT)
    assert difference(joint_law(system, 3), expected(params, 3)) < 1e-12
