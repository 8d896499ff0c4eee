"""The law once more with the real keyed noise: streams, rounds and seeds must not be correlated with one another."""

from itertools import pairwise

import pytest
import torch
from generation import Request, generate
from tiny_world import DRAFTERS, V, plain_law, target_logits

from dspark.common.sampling_params import SamplingParams
from dspark.speculation.planner import parse_planner

REQUESTS, TOKENS = 120, 50
BOUND = 4.0  # standard deviations of a chi-square statistic; the seeds are fixed, so this never flickers


@pytest.mark.parametrize(("drafter", "planner"), [("markov", "full"), ("model", "threshold:0.6"), ("lookup", "full")])
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_transitions_of_long_texts_follow_the_target(acceptance, drafter, planner):
    params = SamplingParams(max_tokens=TOKENS, temperature=0.9, acceptance=acceptance)
    batch = [Request(params, [seed % V], seed) for seed in range(REQUESTS)]
    counts_VV = torch.zeros(V, V, dtype=torch.float64)
    second_VV = torch.zeros(V, V, dtype=torch.float64)  # the two transitions of consecutive steps, by middle token
    for output in generate(batch, DRAFTERS[drafter], parse_planner(planner)):
        for before, after in pairwise(output):
            counts_VV[before, after] += 1
        for before, after in zip(output, output[2:], strict=False):
            second_VV[before, after] += 1
    law_VV = torch.tensor([plain_law(target_logits([v]), params, [v], []) for v in range(V)], dtype=torch.float64)
    expected_VV = counts_VV.sum(1, keepdim=True) * law_VV
    statistic, freedom = ((counts_VV - expected_VV) ** 2 / expected_VV).sum(), V * (V - 1)
    assert abs(statistic - freedom) < BOUND * (2 * freedom) ** 0.5
    two_steps_VV = second_VV.sum(1, keepdim=True) * (law_VV @ law_VV)
    deviation_VV = (second_VV - two_steps_VV) / two_steps_VV.sqrt()
    assert deviation_VV.abs().max() < BOUND
