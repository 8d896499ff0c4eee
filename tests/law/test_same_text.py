"""Where the text is a function of seed and prompt, no drafter, plan, batch or fast path may change it."""

import pytest
import torch
from generation import Request, generate
from tiny_world import DRAFTERS, PLANNER_NAMES, plain_law, target_logits

from dspark.common.rng import COUPLED, exponential_noise
from dspark.common.sampling_params import SamplingParams
from dspark.speculation import reference
from dspark.speculation.planner import Fixed, Full, parse_planner
from dspark.speculation.round import Round
from dspark.speculation.survival import survival

PARAMS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.3, "repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 0.0, "frequency_penalty": 0.4, "logit_bias": {3: 1.0}},
    {"temperature": 0.0},
]
TOKENS = 24


def requests(acceptance: str | None, order: int = 1) -> list[Request]:
    made = [
        Request(SamplingParams(max_tokens=TOKENS - i, acceptance=acceptance, **p), [i % 4, (3 * i) % 4], 100 + i)
        for i, p in enumerate(PARAMS)
    ]
    return made[::order]


def plain(request: Request) -> list[int]:
    """Plain decoding of one coupled or greedy request from the definitions alone."""
    output: list[int] = []
    while len(output) < request.params.max_tokens:
        law = plain_law(target_logits([*request.prompt, *output]), request.params, request.prompt, output)
        noise = exponential_noise(torch.tensor([request.seed]), torch.tensor([len(output)]), len(law), COUPLED)[0]
        output.append(max(range(len(law)), key=lambda v: law[v] / float(noise[v])))
    return output


@pytest.mark.parametrize("planner", PLANNER_NAMES)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_coupled_and_greedy_text_is_plain_decodings(acceptance, drafter, planner):
    for batch in (requests(acceptance), requests(acceptance, -1)):
        if acceptance == "rejection":
            batch = [r for r in batch if r.params.temperature == 0]
        wanted = [plain(r) for r in batch]
        assert generate(batch, DRAFTERS[drafter], parse_planner(planner)) == wanted


def test_batch_composition_changes_nothing():
    wanted = [generate([r], DRAFTERS["markov"], Full())[0] for r in requests("coupled")]
    found = generate(requests("coupled"), DRAFTERS["parallel"], Fixed(2), admit=lambda n: 1 + n % 4)
    assert found == wanted


def test_the_rules_mix_in_one_batch():
    coupled, rejection = requests("coupled"), requests("rejection")
    wanted = [plain(r) for r in coupled], [generate([r], DRAFTERS["model"], Full())[0] for r in requests("rejection")]
    generate([r for pair in zip(coupled, rejection, strict=True) for r in pair], DRAFTERS["model"], Full())
    assert ([r.output for r in coupled], [r.output for r in rejection]) == wanted


@pytest.mark.parametrize("planner", PLANNER_NAMES)
@pytest.mark.parametrize("drafter", ["markov", "parallel", "model", "none"])
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_fast_path_equals_the_reference(acceptance, drafter, planner):
    drafting, planning, slots = DRAFTERS[drafter], parse_planner(planner), 3
    batch = requests(acceptance)
    found = generate(batch, drafting, planning, slots)

    def propose(committed, drafted):
        return drafting.logits(committed, drafted), drafting.confidence(committed, drafted)

    def plan(confidence, limit):
        if not limit:
            return 0
        return planning.plan(Round([limit]), survival(torch.tensor([confidence])) if confidence else None)[0]

    for request, output in zip(batch, found, strict=True):
        arguments = (request.prompt, target_logits, propose if drafting else None, plan, request.params)
        assert output == reference.generate(*arguments, slots=slots, seed=request.seed)


def test_rejection_noise_is_fresh_in_every_round():
    """A request that is cut to plans of 0 meets new uniforms for the positions it drafts again."""
    batch = requests("rejection")
    assert generate(batch, DRAFTERS["markov"], Full()) != generate(
        [Request(r.params, r.prompt, r.seed, counter=1) for r in batch], DRAFTERS["markov"], Full()
    )
